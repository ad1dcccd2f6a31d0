"""Huawei's fused operations from torch_npu, each in the meaning of `reference`.

Written from what Huawei publishes of each, and from torch_npu 2.13's schemas
(tests/chips/torch_npu_wheel/schemas.json); not run on hardware by us. The sentences that each use relies on, with their
sources, are beside the tests (tests/chips/emulated/test_ascend_operations.py). Where page and kernel differ, the use is
right under both. Every version is compared with the reference on the device when it is chosen, and not taken where it
differs. What an operation is not published to take, the reference does in its place, and a warning says so once. A call
without rows is the reference's without a word: it computes nothing.
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
"""Documents of one call at most: the page allows 1 K entries in the lists of lengths, the operator 2 K."""
_MOST_KEYS = 1_000_000
"""Keys of one call at most; queries are no more."""
_RIGHT_DOWN_CAUSAL = 3
_ROWS, _INNER = 0, 2
"""group_type of npu_grouped_matmul: which dimension of the left matrix the groups cut."""


_SERIES = {"A2": ("Ascend910B",), "A3": ("Ascend910_93", "Ascend910C"), "950": ("Ascend950",), "910A": ("Ascend910",)}
"""What the models of each series are called, tried in this order."""


def _operation(name: str) -> Any:
    return getattr(torch.ops.npu, name)


def _series(device_type: str) -> str | None:
    """The series of the chip that is here; None where its name is none of ours."""
    model = torch.get_device_module(device_type).get_device_name()
    return next((series for series, names in _SERIES.items() if model.startswith(names)), None)


def _lacks(
    *names: str, precisions: tuple[str, ...] = ("bf16", "fp32"), series: tuple[str, ...] = ("A2", "A3", "950")
) -> Any:
    """What a version needs: operations of torch_npu by name, a precision that they take, a chip that has them.

    No version is for the 910A: most of these operations are not published for it, and the rotation with other limits.
    A chip with an unknown name is left to the comparison with the reference.
    """

    def lacks(device_type: str, precision: str) -> str | None:
        missing = [name for name in names if not hasattr(torch.ops.npu, name)]
        if missing:
            return f"this torch_npu has no {' and no '.join(missing)}"
        if precision not in precisions:
            return f"{names[0]} takes {', '.join(precisions)}, not {precision}"
        here = _series(device_type)
        return None if here in (None, *series) else f"{names[0]} is for the {', '.join(series)}, and this is a {here}"

    return lacks


def _beyond(operation: str, limit: str) -> None:
    """Say, once, that an operation has met its limit."""
    warnings.warn(f"{operation} {limit}: the reference runs instead", RuntimeWarning, stacklevel=3)


def _fits(operation: str, **sizes: tuple[int, int]) -> bool:
    """Whether no size is more than the most that is published, each given as both; if one is, that is said."""
    over = [f"{most:,} {name.replace('_', ' ')}, not {size:,}" for name, (size, most) in sizes.items() if size > most]
    if over:
        _beyond(operation, f"takes at most {' and '.join(over)}")
    return not over


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`; the weight, as it is or in the dtype of `x`, is multiplied in before the result is rounded.

    No rows would give the weight a gradient of nan.
    """
    if not x.numel():
        return reference.rms_norm(x, weight, eps)
    gamma = weight if weight.dtype == torch.float32 else weight.to(x.dtype)
    return _operation("npu_rms_norm")(x, gamma, eps)[0]


class _AddRMSNorm(torch.autograd.Function):
    """npu_add_rms_norm has no gradient in torch_npu: this is the norm's at the sum, plus the sum's."""

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


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`: one pass over both addends, all of one dtype."""
    if not x.numel():
        return reference.add_rms_norm(x, branch, weight, eps)
    return _AddRMSNorm.apply(x, branch.to(x.dtype), weight.to(x.dtype), eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rotate`; in fp32, as there: the operation wants one dtype of all three.

    Its tables are to be within [-1, 1], and rules for longer texts multiply them by more. The rotation is linear, so
    that factor goes to `x`, on the device: the host waits for no value. Where it is 1, nothing changes by a bit.
    """
    rows, _, heads, size = x.shape
    if not x.numel() or not _fits("npu_rotary_mul", rows=(rows, 999), heads=(heads, 999), elements=(size, 895)):
        return reference.rotate(x, cos, sin)
    largest = torch.stack((cos, sin)).abs().amax().clamp(min=1.0).view(1)  # [1]: a factor of no dimension is not fp32
    cos, sin = cos / largest, sin / largest
    return _operation("npu_rotary_mul")(x * largest, cos[None, :, None], sin[None, :, None]).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.swiglu`; the operation wants both halves in one tensor.

    Its gradient takes rows of whole 64 bytes, and what comes from above laid out whole.
    """
    if not gate.numel():
        return reference.swiglu(gate, up)
    both = torch.cat((gate, up), -1)
    if both.shape[-1] * both.element_size() % 64:
        _beyond(
            "npu_swiglu", f"has no gradient for rows of {both.shape[-1]} {both.dtype}, which are not whole 64 bytes"
        )
        return reference.swiglu(gate, up)
    out = _operation("npu_swiglu")(both, -1)
    if out.requires_grad:
        out.register_hook(Tensor.contiguous)
    return out


class _Documents(NamedTuple):
    """Where documents end in the rows of a batch, on the host."""

    of: ref[Tensor]
    ends: list[list[int]]
    """Ends of each row's documents, ascending; the last is the row's length."""


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


def _attends(query: Tensor, key: Tensor) -> bool:
    """Whether npu_fusion_attention and its gradient are published for such queries and keys."""
    name = "npu_fusion_attention"
    if not query.numel():
        return False
    if query.dtype == torch.float32:
        _beyond(name, "is not used in fp32")
        return False
    # The gradient's page said 512 elements once and says 768 now.
    return _fits(name, heads=(query.shape[2], 256), elements=(query.shape[3], 512), keys=(key.shape[1], _MOST_KEYS))


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, document_ids: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """`reference.attention` by npu_fusion_attention, packed documents by their lengths instead of a mask."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not _attends(query, key):
        return reference.attention(query, key, value, document_ids=document_ids, dropout=dropout)
    queries, keys = query.shape[1], key.shape[1]
    heads, size = query.shape[2:]
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
    for documents in _cut(lengths):
        of_queries, of_keys = zip(*documents, strict=True)
        own, from_query = from_query[: sum(of_queries)], from_query[sum(of_queries) :]
        keys_here, from_key = from_key[: sum(of_keys)], from_key[sum(of_keys) :]
        values_here, value = value[: sum(of_keys)], value[sum(of_keys) :]
        outs.append(
            _operation("npu_fusion_attention")(
                own,
                keys_here,
                values_here,
                heads,
                "TND",
                atten_mask=mask,
                scale=size**-0.5,
                keep_prob=1.0 - dropout,
                actual_seq_qlen=list(accumulate(of_queries)),
                actual_seq_kvlen=list(accumulate(of_keys)),
                sparse_mode=_RIGHT_DOWN_CAUSAL,
            )[0]
        )
    return torch.cat(outs).unflatten(0, (len(query), queries))


def _cut(lengths: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Documents, each with its queries and its keys, which are no fewer, as calls may have them together."""
    calls: list[list[tuple[int, int]]] = [[]]
    keys = 0
    for document in lengths:
        keys += document[1]
        if len(calls[-1]) == _MOST_DOCUMENTS or keys > _MOST_KEYS:
            calls.append([])
            keys = document[1]
        calls[-1].append(document)
    return calls


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
    if not len(x):
        return reference.grouped_matmul(x, weights, ends)
    if len(weights) == 1:
        _beyond("npu_grouped_matmul", "is published for one group alone in some of its forms only")
        return reference.grouped_matmul(x, weights, ends)
    if not _fits("npu_grouped_matmul", groups=(len(weights), 1024), elements_a_row=(max(weights.shape[1:]), 65_535)):
        return reference.grouped_matmul(x, weights, ends)
    return _GroupedMatmul.apply(x, weights, ends.long())


def permute(x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.permute`; rows are bf16 there, whatever they were, and places int32."""
    routes, a_token = experts.numel(), experts.shape[1]
    if not routes or not _fits("npu_moe_token_permute", rows=(routes, 16_777_214), experts_a_token=(a_token, 512)):
        return reference.permute(x, experts)
    rows, places = _operation("npu_moe_token_permute")(x.bfloat16(), experts)
    return rows, places


def unpermute(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """`reference.unpermute`, weights rounded to bf16; the operator lists int32 places alone."""
    if not len(rows) or not _fits("npu_moe_token_unpermute", experts_a_token=(weights.shape[1], 512)):
        return reference.unpermute(rows, places, weights)
    return _operation("npu_moe_token_unpermute")(rows.bfloat16(), places.int(), weights.bfloat16())


class _OnlineCrossEntropy(torch.autograd.Function):
    """Maximum and sum of a row's logits made where the logits are, which never leave the chip's units."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, part: reference.VocabularyPart) -> Tensor:
        matrix = weight.to(hidden.dtype)
        # By the page the last index belongs to the part, by the kernel it does not. With labels of others ignored and
        # an index past the end, no label is there to be read either way.
        past = part.first + len(matrix)
        owned = (labels >= part.first) & (labels < past)
        top_here, sum_here, below, outside, inside, _ = _operation("npu_fused_linear_online_max_sum")(
            hidden, matrix, labels.where(owned, reference.IGNORE_INDEX), part.first, past
        )
        top = part.max(top_here)
        total = part.sum(sum_here * (top_here - top).exp())
        # The label's logit comes less this part's maximum; it is wanted less that of all parts.
        wanted = part.sum((below + (top_here - top)) * owned)
        counted = labels != reference.IGNORE_INDEX
        ctx.save_for_backward(hidden, matrix, outside, inside, top, total, counted)
        ctx.weight_dtype = weight.dtype
        return (total.log() - wanted) * counted

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
    """`reference.linear_cross_entropy` without logits in memory; needs CANN 9.

    The page also wants the first and last index below the largest label. No code tests that, and no part of a
    vocabulary that labels lie before could keep it.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    vocabulary = part or reference.Whole()
    if not _takes(hidden, weight, vocabulary.first):
        return reference.linear_cross_entropy(hidden, weight, labels, multiplier, part, reduction)
    scaled = hidden if multiplier == 1.0 else hidden * multiplier
    losses: Tensor = _OnlineCrossEntropy.apply(scaled, weight, labels, vocabulary)
    return losses.sum() if reduction == "sum" else losses


def _takes(hidden: Tensor, weight: Tensor, first: int) -> bool:
    """Whether the fused loss and its gradient are published for such rows and such a part of a vocabulary."""
    name = "npu_fused_linear_online_max_sum"
    if not len(hidden):
        return False
    if hidden.dtype == torch.float32:
        _beyond(name, "takes no fp32 rows")
        return False
    if len(weight) < 128:
        _beyond(name, f"has no gradient for fewer than 128 tokens, and here are {len(weight)}")
        return False
    # It compares numbers of tokens in fp32.
    return _fits(name, elements_a_row=(hidden.shape[1], 65_534), tokens=(first + len(weight), 1 << 24))


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
                series=("A2", "A3"),
            ),
        ),
    )
)
