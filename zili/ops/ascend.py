"""Huawei's fused operations from torch_npu, each in the meaning of `reference`.

Written from torch_npu 2.13's own documentation and schemas (tests/chips/torch_npu_wheel/schemas.json); not run on
hardware by us. Every version is compared with the reference on the device when it is chosen, and not taken where it
differs. Where an operation's limits do not allow a call (see each), the reference runs in its place.
"""

from __future__ import annotations

import warnings
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from zili.ops import reference
from zili.ops.versions import Version

_COMPRESSED_MASK = 2048
"""Side of the triangle that sparse_mode 3 wants in place of a mask of the true size."""
_MOST_DOCUMENTS = 1000
"""Of one call: the lists of lengths may hold 1 K entries."""
_RIGHT_DOWN_CAUSAL = 3
_ROWS, _INNER = 0, 2
"""group_type of npu_grouped_matmul: which dimension of the left matrix the groups cut."""


def _operation(name: str) -> Any:
    return getattr(torch.ops.npu, name)


def _lacks(*names: str, precisions: tuple[str, ...] = ("bf16", "fp32")) -> Any:
    """What a version needs: operations of torch_npu by name, and a precision that they take."""

    def lacks(device_type: str, precision: str) -> str | None:
        missing = [name for name in names if not hasattr(torch.ops.npu, name)]
        if missing:
            return f"this torch_npu has no {' and no '.join(missing)}"
        return None if precision in precisions else f"{names[0]} takes {', '.join(precisions)}, not {precision}"

    return lacks


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`; the weight is multiplied in before the result is rounded."""
    return _operation("npu_rms_norm")(x, weight.to(x.dtype), eps)[0]


class _AddRMSNorm(torch.autograd.Function):
    """npu_add_rms_norm has no gradient of its own: it is the norm's at the sum, and the sum's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, scale, total = _operation("npu_add_rms_norm")(x, branch, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return normed, total

    @staticmethod
    def backward(ctx: Any, by_norm: Tensor, by_sum: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight, scale = ctx.saved_tensors
        by_total, by_weight = _operation("npu_rms_norm_backward")(by_norm.contiguous(), total, weight, scale)
        by_total = by_total + by_sum
        return by_total, by_total, by_weight.to(weight.dtype), None


def _beyond(operation: str, limit: str) -> None:
    """Say, once, that an operation has met its limit."""
    warnings.warn(f"{operation} {limit}: the reference runs instead", RuntimeWarning, stacklevel=2)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`: one pass over both addends."""
    return _AddRMSNorm.apply(x, branch.to(x.dtype), weight.to(x.dtype), eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rotate`; in fp32, as there: the operation wants one dtype of all three."""
    if x.shape[0] >= 1000 or x.shape[2] >= 1000 or x.shape[3] >= 896:
        _beyond("npu_rotary_mul", f"takes less than 1000 rows, 1000 heads and 896 elements, not {list(x.shape)}")
        return reference.rotate(x, cos, sin)
    return _operation("npu_rotary_mul")(x.float(), cos[None, :, None], sin[None, :, None]).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.swiglu`; the operation wants both halves in one tensor."""
    return _operation("npu_swiglu")(torch.cat((gate, up), -1), -1)


class _Documents(NamedTuple):
    """Where documents end in the rows of a batch, on the host."""

    of: ref[Tensor]
    ends: list[list[int]]
    """Of each row, ascending; the last is the row's length."""


_last_seen: _Documents | None = None


def _ends(document_ids: Tensor) -> list[list[int]]:
    """Ends of the documents of each row of `[B, T]`, for which the host waits for the device.

    All layers of a micro-batch ask for the same, so it waits once; with context parallelism, where each asks for a
    part, in every layer.
    """
    global _last_seen  # noqa: PLW0603 - the last answer, which is asked for again by the next layer
    if _last_seen is None or _last_seen.of() is not document_ids:
        is_last = torch.nn.functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (0, 1), value=True)
        rows = is_last.cpu()
        _last_seen = _Documents(ref(document_ids), [(row.nonzero().flatten() + 1).tolist() for row in rows])
    return _last_seen.ends


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, document_ids: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """`reference.attention` by npu_fusion_attention, packed documents by their lengths instead of a mask."""
    queries, keys = query.shape[1], key.shape[1]
    if query.dtype == torch.float32:
        return reference.attention(query, key, value, document_ids=document_ids, dropout=dropout)
    ends = [[keys]] * len(query) if document_ids is None else _ends(document_ids)
    # The queries are the last positions of their rows; documents that end before them have none, and no part here.
    first = keys - queries
    lengths = [
        (end - max(begin, first), end - begin) for row in ends for begin, end in pairwise([0, *row]) if end > first
    ]
    starts = [next(begin for begin, end in pairwise([0, *row]) if end > first) for row in ends]
    if any(starts):
        key = torch.cat([part[start:] for part, start in zip(key, starts, strict=True)])
        value = torch.cat([part[start:] for part, start in zip(value, starts, strict=True)])
    else:
        key, value = key.flatten(0, 1), value.flatten(0, 1)
    side = _COMPRESSED_MASK
    mask = torch.ones(side, side, dtype=torch.bool, device=query.device).triu(1)  # True is not seen
    outs, from_query, from_key = [], query.flatten(0, 1), key
    for start in range(0, len(lengths), _MOST_DOCUMENTS):
        of_queries, of_keys = zip(*lengths[start : start + _MOST_DOCUMENTS], strict=True)
        own, from_query = from_query[: sum(of_queries)], from_query[sum(of_queries) :]
        keys_here, from_key = from_key[: sum(of_keys)], from_key[sum(of_keys) :]
        values_here, value = value[: sum(of_keys)], value[sum(of_keys) :]
        outs.append(
            _operation("npu_fusion_attention")(
                own,
                keys_here,
                values_here,
                query.shape[2],
                "TND",
                atten_mask=mask,
                scale=query.shape[-1] ** -0.5,
                keep_prob=1.0 - dropout,
                actual_seq_qlen=list(accumulate(of_queries)),
                actual_seq_kvlen=list(accumulate(of_keys)),
                sparse_mode=_RIGHT_DOWN_CAUSAL,
            )[0]
        )
    return torch.cat(outs).unflatten(0, (len(query), queries))


class _GroupedMatmul(torch.autograd.Function):
    """npu_grouped_matmul has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, ends)
        return _grouped(x, weights.transpose(1, 2), ends, _ROWS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weights, ends = ctx.saved_tensors
        grad = grad.contiguous()
        by_rows = _grouped(grad, weights, ends, _ROWS)
        return by_rows, _grouped(grad.t(), x, ends, _INNER), None


def _grouped(a: Tensor, b: Tensor, ends: Tensor, group_type: int) -> Tensor:
    # split_item 3: one tensor out; group_list_type 0: the list has ends, not sizes.
    return _operation("npu_grouped_matmul")(
        [a], [b], group_list=ends, split_item=3, group_type=group_type, group_list_type=0
    )[0]


def grouped_matmul(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`reference.grouped_matmul`; an expert may have no rows."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), weights.to(dtype)
    if len(weights) == 1:
        _beyond("npu_grouped_matmul", "refuses one group alone")
    if not len(x) or len(weights) == 1:
        return reference.grouped_matmul(x, weights, ends)
    return _GroupedMatmul.apply(x, weights, ends.long())


def permute(x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.permute`; rows are bf16 there, whatever they were."""
    rows, places = _operation("npu_moe_token_permute")(x.bfloat16(), experts)
    return rows, places


def unpermute(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """`reference.unpermute`, weights rounded to bf16."""
    return _operation("npu_moe_token_unpermute")(rows.bfloat16(), places, weights.bfloat16())


class _OnlineCrossEntropy(torch.autograd.Function):
    """Maximum and sum of a row's logits made where the logits are, which never leave the chip's units."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, part: reference.VocabularyPart) -> Tensor:
        matrix = weight.to(hidden.dtype)
        last = part.first + len(weight) - 1  # the last index belongs to the part
        top_here, sum_here, wanted, outside, inside, _ = _operation("npu_fused_linear_online_max_sum")(
            hidden, matrix, labels, part.first, last
        )
        top = part.max(top_here)
        total = part.sum(sum_here * (top_here - top).exp())
        # What is outside of this part gave 0, and the maximum is taken off once for all parts.
        wanted = part.sum(wanted)
        counted = labels != reference.IGNORE_INDEX
        ctx.save_for_backward(hidden, matrix, outside, inside, top, total, counted)
        ctx.weight_dtype = weight.dtype
        return (total.log() + top - wanted) * counted

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, matrix, outside, inside, top, total, counted = ctx.saved_tensors
        by_hidden, by_weight = _operation("npu_fused_linear_cross_entropy_loss_with_max_sum_backward")(
            grad * counted.float(), hidden, matrix, outside, inside, logits_max=top, sum_exp_logits=total
        )
        return by_hidden, by_weight.to(ctx.weight_dtype), None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    multiplier: float = 1.0,
    part: reference.VocabularyPart | None = None,
    reduction: reference.Reduction = "sum",
) -> Tensor:
    """`reference.linear_cross_entropy` without logits in memory; needs CANN 9."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if hidden.dtype == torch.float32 or len(weight) < 128:
        _beyond("npu_fused_linear_online_max_sum", f"takes no {hidden.dtype} rows or {len(weight)} tokens")
        return reference.linear_cross_entropy(hidden, weight, labels, multiplier, part, reduction)
    scaled = hidden if multiplier == 1.0 else hidden * multiplier
    losses: Tensor = _OnlineCrossEntropy.apply(scaled, weight, labels, part or reference.Whole())
    return losses.sum() if reduction == "sum" else losses


_HALF = ("bf16",)
VERSIONS = tuple(
    partial(Version, name="npu")(operation, function=function, lacks=lacks)
    for operation, function, lacks in (
        ("rms_norm", rms_norm, _lacks("npu_rms_norm")),
        ("add_rms_norm", add_rms_norm, _lacks("npu_add_rms_norm", "npu_rms_norm_backward")),
        ("rotate", rotate, _lacks("npu_rotary_mul")),
        ("swiglu", swiglu, _lacks("npu_swiglu")),
        ("attention", attention, _lacks("npu_fusion_attention", precisions=_HALF)),
        ("grouped_matmul", grouped_matmul, _lacks("npu_grouped_matmul")),
        ("permute", permute, _lacks("npu_moe_token_permute", precisions=_HALF)),
        ("unpermute", unpermute, _lacks("npu_moe_token_unpermute", precisions=_HALF)),
        (
            "linear_cross_entropy",
            linear_cross_entropy,
            _lacks(
                "npu_fused_linear_online_max_sum",
                "npu_fused_linear_cross_entropy_loss_with_max_sum_backward",
                precisions=_HALF,
            ),
        ),
    )
)
