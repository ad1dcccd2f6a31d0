"""torch's attention where fewer heads of keys and values are shared by groups of query heads.

Not every vendor's form of it takes them so (capability `grouped_heads_attention`). Where it does not, keys and values
are repeated first, and their gradients summed: the same numbers, in `heads / kv_heads` times their memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from zili.chips import registry

CAPABILITY = "grouped_heads_attention"
_taken: dict[str, bool] = {}
"""Whether devices of a type take grouped heads, as far as it was asked or decided."""


def decide(device_type: str, lacking: Mapping[str, str] | None) -> None:
    """From now on as a device that lacks so much (`Device.lacking`) has it; None: as its record says."""
    _taken.pop(device_type, None)
    if lacking is not None:
        _taken[device_type] = CAPABILITY not in lacking


def takes_groups(device_type: str) -> bool:
    """What was decided for devices of this type; else what the record of their backend says."""
    if device_type not in _taken:
        records = (one for one in registry().backends if one.device_type == device_type)
        _taken[device_type] = all(one.capability(CAPABILITY).value for one in records)
    return _taken[device_type]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`query [..., H, S, d]`, `key [..., K, T, d]`, `value [..., K, T, d_v]` -> `[..., H, S, d_v]`, H a multiple of K.

    `mask` is added to the scores, or true where a key is seen; `scale` is 1/sqrt(d) if not given.
    """
    key, value = for_each_group(query, key, value, -3)
    grouped = query.shape[-3] != key.shape[-3]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def for_each_group(query: Tensor, key: Tensor, value: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Keys and values as the device's attention takes them beside `query`: of heads in `dimension`, or repeated."""
    shared = query.shape[dimension] // key.shape[dimension]
    if shared == 1 or takes_groups(query.device.type):
        return key, value
    return key.repeat_interleave(shared, dimension), value.repeat_interleave(shared, dimension)
