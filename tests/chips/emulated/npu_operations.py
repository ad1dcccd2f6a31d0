"""torch_npu's fused operations for the emulated device, from Huawei's documentation of each, under the wheel's schemas.

They say what the arguments mean (which mask hides, what a list of lengths holds, which index is the last), in plain
torch: a call of ours that means something else gives other numbers. That the chip computes what is documented is not
shown by them. Operations whose gradient the wheel has are differentiated here too; the others are not, as there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TABLE = Path(__file__).parents[1] / "torch_npu_wheel" / "schemas.json"


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert input.dtype == gamma.dtype
    wide = input.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale * gamma.float()).to(input.dtype), scale


def npu_rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    wide, upstream = input.float(), dy.float()
    normed = wide * rstd
    by_normed = upstream * gamma.float()
    by_input = rstd * (by_normed - normed * (by_normed * normed).mean(-1, keepdim=True))
    return by_input.to(input.dtype), (upstream * normed).flatten(0, -2).sum(0)


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    assert x1.dtype == x2.dtype == gamma.dtype
    total = x1 + x2
    return (*npu_rms_norm(total, gamma, epsilon), total)


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    assert input.dtype == r1.dtype == r2.dtype and input.dim() == r1.dim() == r2.dim() == 4 and rotary_mode == "half"
    first, second = input.chunk(2, -1)
    return r1 * input + r2 * torch.cat((-second, first), -1)


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.chunk(2, dim)
    return F.silu(gate) * up


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    assert input_layout == "TND" and rest["sparse_mode"] == 3 and head_num == query.shape[1]
    assert torch.equal(rest["atten_mask"].cpu(), torch.ones(2048, 2048, dtype=torch.bool).triu(1)), "True hides"
    assert rest["keep_prob"] == 1.0
    queries, keys = rest["actual_seq_qlen"], rest["actual_seq_kvlen"]
    assert queries[-1] == len(query) and keys[-1] == len(key) and len(queries) == len(keys)
    group = query.shape[1] // key.shape[1]
    out = []
    for (q, q_end), (k, k_end) in zip(pairwise([0, *queries]), pairwise([0, *keys]), strict=True):
        rows, columns = q_end - q, k_end - k
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
    assert ends.dtype == torch.int64 and left.dtype == right.dtype
    groups = list(pairwise([0, *ends.tolist()]))
    if rest["group_type"] == 0:  # rows of the left matrix
        return [torch.cat([left[a:b] @ right[i] for i, (a, b) in enumerate(groups)])]
    assert rest["group_type"] == 2 and right.dim() == 2  # what is summed over
    return [torch.stack([left[:, a:b] @ right[a:b] for a, b in groups])]


def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    assert tokens.dtype == torch.bfloat16 and indices.dtype == torch.int64
    order = indices.flatten().argsort(stable=True)
    return tokens[order // indices.shape[1]], order.argsort().int()


def npu_moe_token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False, **rest: Any
) -> Tensor:
    assert probs is not None and permuted_tokens.dtype == probs.dtype == torch.bfloat16
    rows = permuted_tokens[sorted_indices.long()].unflatten(0, probs.shape)
    return (rows * probs[..., None]).sum(1)


def npu_fused_linear_online_max_sum(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    return_logits: bool = False,
) -> tuple[Tensor, ...]:
    assert input.dtype == weight.dtype == torch.bfloat16 and 0 <= vocab_start_index <= vocab_end_index
    assert vocab_end_index - vocab_start_index < len(weight), "the last index belongs to the part"
    logits = (input @ weight.t()).float()
    outside = (target < vocab_start_index) | (target > vocab_end_index)
    inside = (target - vocab_start_index).masked_fill(outside, 0)
    top = logits.amax(1)
    total = (logits - top[:, None]).exp().sum(1)
    wanted = logits.gather(1, inside[:, None]).squeeze(1).masked_fill(outside, 0.0)
    return top, total, wanted, _packed(outside), inside, input.new_empty(0)


def npu_fused_linear_cross_entropy_loss_with_max_sum_backward(
    grad: Tensor, input: Tensor, weight: Tensor, target_mask: Tensor, masked_target: Tensor, **rest: Any
) -> tuple[Tensor, Tensor]:
    outside = _unpacked(target_mask, len(input))
    logits = (input @ weight.t()).float()
    by_logits = (logits - rest["logits_max"][:, None]).exp() / rest["sum_exp_logits"][:, None]
    by_logits[torch.arange(len(input), device=input.device), masked_target] -= (~outside).float()
    by_logits = (by_logits * grad[:, None]).to(input.dtype)
    return by_logits @ weight, by_logits.t() @ input


_BITS = tuple(2**bit for bit in range(7, -1, -1))


def _packed(bits: Tensor) -> Tensor:
    """Eight to a byte, the first highest; what is over is set."""
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
    """`function` with the schema's defaults for what a call leaves out, by name."""
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}

    def called(*arguments: Any, **keywords: Any) -> Any:
        return function(**{**defaults, **dict(zip(positional, arguments, strict=False)), **keywords})

    return called


def _define() -> None:
    for name, text in json.loads(_TABLE.read_text(encoding="utf-8"))["schemas"].items():
        _LIBRARY.define(text.removeprefix("npu::"))
        key = "CompositeExplicitAutograd" if name in _WITHOUT_GRADIENT else "CompositeImplicitAutograd"
        _LIBRARY.impl(name, _filled(globals()[name], torch._C.parse_schema(text)), key)


_define()
