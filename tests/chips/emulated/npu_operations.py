"""torch_npu's fused operations for the emulated device, as Huawei publishes each, under the wheel's schemas.

They follow the vendor's golden specifications where there are some, else the pages: which mask hides, what a list of
lengths holds, in which precision a step is, in which order bits are packed; and they refuse what is not published to be
taken, so that a wrong use fails in a test. That the chip computes what is published is not shown by them. Operations
whose gradient the wheel has are differentiated here too; the others are not, as there. The sentences, with sources, are
in npu_readings.py; where sources or chips differ, a variable of the process says which is followed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from npu_readings import LAST_INDEX, SERIES
from torch import Tensor
from torch.utils._pytree import tree_leaves

_TABLE = Path(__file__).parents[1] / "torch_npu_wheel" / "schemas.json"
_HALF = (torch.float16, torch.bfloat16)
_FLOATING = (*_HALF, torch.float32)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert input.dtype in _FLOATING and gamma.dtype in (input.dtype, torch.float32)
    assert input.numel(), "no rows: the gradient of gamma would be nan"
    wide = input.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale * gamma.float()).to(input.dtype), scale


def npu_rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    assert dy.dtype == input.dtype in _FLOATING and gamma.dtype in (input.dtype, torch.float32)
    assert rstd.dtype == torch.float32 and rstd.shape == (*input.shape[:-1], 1) and input.numel()
    wide, upstream = input.float(), dy.float()
    normed = wide * rstd
    by_normed = upstream * gamma.float()
    by_input = rstd * (by_normed - normed * (by_normed * normed).mean(-1, keepdim=True))
    return by_input.to(input.dtype), (upstream * normed).flatten(0, -2).sum(0)


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    assert x1.dtype == x2.dtype == gamma.dtype in _FLOATING and x1.numel()
    wide = x1.float() + x2.float()
    total = wide.to(x1.dtype)
    if os.environ.get(SERIES, "A2") == "950":
        normed, scale = npu_rms_norm(wide, gamma.float(), epsilon)
        return normed.to(x1.dtype), scale, total
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    normed = (wide * scale).to(x1.dtype).float()
    return (normed * gamma.float()).to(x1.dtype), scale, total


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    rows, length, heads, size = input.shape
    assert rotary_mode == "half" and rotate is None and input.dtype in _FLOATING
    assert rows < 1000 and heads < 1000 and size < 896 and size % 2 == 0
    assert r1.shape == r2.shape and r1.shape in ((1, length, 1, size), (rows, length, 1, size))
    # Beyond the published range of the tables nothing is known. The host is not made to wait for it here either.
    cos, sin = (table.to(input.dtype).where(table.abs() <= 1.0, torch.nan) for table in (r1, r2))
    first, second = input.chunk(2, -1)
    return cos * input + sin * torch.cat((-second, first), -1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.float().chunk(2, -1)
        return (F.silu(gate) * up).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert grad.is_contiguous() and grad.numel()
        assert x.shape[-1] * x.element_size() % 64 == 0, "rows are not whole 64 bytes"
        (gate, up), grad = x.float().chunk(2, -1), grad.float()
        share = gate.sigmoid()
        return torch.cat((grad * (share + share * (1 - share) * gate) * up, grad * share * gate), -1).to(x.dtype)


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    assert dim == -1 and input.dtype in _FLOATING and input.numel() and input.is_contiguous()
    return _SwiGLU.apply(input)


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    assert input_layout == "TND" and rest["sparse_mode"] == 3 and head_num == query.shape[1]
    assert torch.equal(rest["atten_mask"].cpu(), torch.ones(2048, 2048, dtype=torch.bool).triu(1)), "True hides"
    assert rest["keep_prob"] == 1.0, "dropout is not emulated"
    assert query.dtype == key.dtype == value.dtype in _FLOATING
    assert query.shape[2] == key.shape[2] >= value.shape[2] > 0 and query.shape[2] <= 512
    assert key.shape[:2] == value.shape[:2] and query.shape[1] <= 256 and query.shape[1] % key.shape[1] == 0
    assert 0 < len(query) <= 1_000_000 and 0 < len(key) <= 1_000_000
    queries, keys = rest["actual_seq_qlen"], rest["actual_seq_kvlen"]
    assert queries[-1] == len(query) and keys[-1] == len(key) and len(queries) == len(keys) <= 1024
    group = query.shape[1] // key.shape[1]
    out = []
    for (q, q_end), (k, k_end) in zip(pairwise([0, *queries]), pairwise([0, *keys]), strict=True):
        rows, columns = q_end - q, k_end - k
        assert 0 <= rows <= columns
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(1 + columns - rows)
        wide = key[k:k_end].repeat_interleave(group, 1).float()
        scores = torch.einsum("qhd,khd->hqk", query[q:q_end].float(), wide) * rest["scale"]
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", shares, value[k:k_end].repeat_interleave(group, 1).float()))
    none = query.new_empty(0, dtype=torch.float32)
    return torch.cat(out).to(query.dtype), none, none, none, 0, 0, 0


def npu_grouped_matmul(x: list[Tensor], weight: list[Tensor], **rest: Any) -> list[Tensor]:
    assert rest["split_item"] == 3 and rest["group_list_type"] == 0
    (left,), (right,), ends = x, weight, rest["group_list"]
    assert ends.dtype == torch.int64 and len(ends) <= 1024 and left.dtype == right.dtype in _FLOATING
    groups = list(pairwise([0, *ends.tolist()]))
    assert all(start <= end for start, end in groups)
    turned = [not part.is_contiguous() and part.transpose(-1, -2).is_contiguous() for part in (left, right)]
    assert all(part.is_contiguous() or turned_round for part, turned_round in zip((left, right), turned, strict=True))
    inner = [part.shape[-2 if turned_round else -1] for part, turned_round in zip((left, right), turned, strict=True)]
    assert max(inner) < 65_536
    if rest["group_type"] == 0:  # rows of the left matrix
        assert not turned[0] and groups[-1][1] == len(left) and len(right) == len(groups)
        return [torch.cat([left[a:b] @ right[i] for i, (a, b) in enumerate(groups)])]
    assert rest["group_type"] == 2 and right.dim() == 2  # what is summed over
    assert turned[0] and not turned[1] and groups[-1][1] == len(right)
    return [torch.stack([left[:, a:b] @ right[a:b] for a, b in groups])]


def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    assert tokens.dtype == torch.bfloat16 and indices.dtype in (torch.int32, torch.int64) and not padded_mode
    assert indices.shape[1] <= 512 and 0 < indices.numel() < 16_777_215 and len(indices) == len(tokens)
    order = indices.flatten().argsort(stable=True)
    return tokens[order // indices.shape[1]], order.argsort().int()


def npu_moe_token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False, **rest: Any
) -> Tensor:
    assert probs is not None and permuted_tokens.dtype == probs.dtype == torch.bfloat16 and not padded_mode
    assert sorted_indices.dtype == torch.int32, "the operator lists no other"
    assert probs.shape[1] <= 512 and len(permuted_tokens)
    rows = permuted_tokens[sorted_indices.long()].float().unflatten(0, probs.shape)
    return (rows * probs.float()[..., None]).sum(1).to(permuted_tokens.dtype)


def npu_fused_linear_online_max_sum(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    return_logits: bool = False,
) -> tuple[Tensor, ...]:
    assert input.dtype == weight.dtype in _HALF and target.dtype in (torch.int32, torch.int64)
    assert len(input) and input.shape[1] <= 65_534 and len(weight) and 0 <= vocab_start_index <= vocab_end_index
    logits = (input @ weight.t()).float()
    beyond = target > vocab_end_index if os.environ.get(LAST_INDEX) == "page" else target >= vocab_end_index
    outside = (target < vocab_start_index) | beyond
    inside = (target - vocab_start_index).masked_fill(outside, 0)
    top = logits.amax(1)
    below = logits - top[:, None]
    wanted = below.gather(1, inside.long()[:, None]).squeeze(1).masked_fill(outside, 0.0)
    return top, below.exp().sum(1), wanted, _packed(outside), inside, input.new_empty(0)


def npu_fused_linear_cross_entropy_loss_with_max_sum_backward(
    grad: Tensor, input: Tensor, weight: Tensor, target_mask: Tensor, masked_target: Tensor, **rest: Any
) -> tuple[Tensor, Tensor]:
    top, total = rest["logits_max"], rest["sum_exp_logits"]
    assert rest["softmax"] is None and not rest["label_smoothing"] and input.dtype == weight.dtype in _HALF
    assert grad.dtype == top.dtype == total.dtype == torch.float32 and target_mask.dtype == torch.uint8
    assert len(weight) >= 128 and input.shape[1] <= 65_535
    outside = _unpacked(target_mask, len(input))
    by_logits = ((input @ weight.t()).float() - top[:, None]).exp() / total[:, None]
    by_logits[torch.arange(len(input), device=input.device), masked_target] -= (~outside).float()
    by_logits = (by_logits * grad[:, None]).to(input.dtype)
    return by_logits @ weight, by_logits.t() @ input


_BITS = tuple(2**bit for bit in range(8))


def _packed(bits: Tensor) -> Tensor:
    """Eight to a byte, the first lowest; what is over is set, as the page says."""
    padded = F.pad(bits, (0, -len(bits) % 8), value=True).view(-1, 8)
    return (padded * torch.tensor(_BITS, device=bits.device)).sum(1).to(torch.uint8)


def _unpacked(packed: Tensor, length: int) -> Tensor:
    return (packed.long()[:, None] & torch.tensor(_BITS, device=packed.device)).ne(0).flatten()[:length]


_WITHOUT_GRADIENT = (
    *("npu_add_rms_norm", "npu_rms_norm_backward", "npu_grouped_matmul", "npu_fused_linear_online_max_sum"),
    "npu_fused_linear_cross_entropy_loss_with_max_sum_backward",
)
_LIBRARY = torch.library.Library("npu", "DEF")


def _filled(function: Callable[..., Any], schema: Any) -> Callable[..., Any]:
    """`function` with the schema's defaults for what a call leaves out, by name, below autocast."""
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}

    def called(*arguments: Any, **keywords: Any) -> Any:
        given = {**defaults, **dict(zip(positional, arguments, strict=False)), **keywords}
        place = next(leaf.device.type for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
        with torch.autocast(place, enabled=False):
            return function(**given)

    return called


def _define() -> None:
    for name, text in json.loads(_TABLE.read_text(encoding="utf-8"))["schemas"].items():
        _LIBRARY.define(text.removeprefix("npu::"))
        key = "CompositeExplicitAutograd" if name in _WITHOUT_GRADIENT else "CompositeImplicitAutograd"
        _LIBRARY.impl(name, _filled(globals()[name], torch._C.parse_schema(text)), key)


_define()
