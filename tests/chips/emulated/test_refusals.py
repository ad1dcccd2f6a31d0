"""What a vendor is known to turn down, its emulated device turns down; and no run asks for it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from many import on_processes
from plugins import ASCEND, CAMBRICON, VENDORS, Environment, Vendor

from zili import chips
from zili.chips import CAPABILITIES, find_backend

CALLS = {
    "aten::scaled_dot_product_attention": lambda device: F.scaled_dot_product_attention(
        *(torch.ones(1, heads, 4, 8, device=device, requires_grad=True) for heads in (6, 2, 2)), enable_gqa=True
    ),
    "aten::logsumexp": lambda device: torch.ones(4, 8, dtype=torch.bfloat16, device=device).logsumexp(-1),
    "c10d::PREMUL_SUM": lambda device: dist.all_reduce(
        torch.ones(4, device=device), op=dist._make_nccl_premul_sum(2.0)
    ),
}


def turned_down(vendor: str) -> dict[str, str]:
    """Each call that the record names, and what came of it."""
    backend = find_backend(vendor)
    device = chips.activate(backend).device
    dist.init_process_group(backend.collectives, store=dist.HashStore(), rank=0, world_size=1)
    found = {}
    for refusal in backend.refusals:
        try:
            CALLS[refusal.operation](device)
        except (TypeError, RuntimeError, ValueError) as error:
            found[refusal.operation] = str(error)
    # What is near to them is taken.
    F.scaled_dot_product_attention(*(torch.ones(1, 2, 4, 8, device=device, requires_grad=True) for _ in range(3)))
    torch.ones(4, 8, device=device, requires_grad=True).logsumexp(-1).sum().backward()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("vendor", [ASCEND, CAMBRICON], ids=str)
def test_they_are_on(vendor: Vendor, with_plugins: Environment) -> None:
    backend = find_backend(vendor.backend)
    (found,) = on_processes(1, turned_down, vendor.backend, environment=with_plugins(vendor))
    assert set(found) == {refusal.operation for refusal in backend.refusals} and found


def attention_and_gradients(vendor: str | None, takes_groups: bool | None) -> list[torch.Tensor]:
    """Of eight query heads and two of keys and values; by itself, in a slot of the engine, and as align repeats it."""
    from zili import ops
    from zili.diagnosis import shadow
    from zili.models.cache import _Longer
    from zili.ops import reference

    device = torch.device("cpu") if vendor is None else chips.activate(find_backend(vendor)).device
    lacking = None if takes_groups is None else {} if takes_groups else {"grouped_heads_attention": "a test"}
    ops.choose(device.type, "fp32", dict.fromkeys(ops.chosen(), "reference"), lacking=lacking)
    draw = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, 16, count, 8, generator=draw) for count in (8, 2, 2)]
    leaves = [one.to(device).requires_grad_() for one in heads]
    documents = (torch.arange(16) > 5).int().expand(2, -1).to(device)
    out = reference.attention(*leaves, document_ids=documents)
    out.square().sum().backward()
    query, key, value = (one.detach().transpose(1, 2) for one in leaves)
    slot = _Longer(16, 1, 16, None).attend(query[1].transpose(0, 1), key, value)
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    (again,) = shadow._attention(operation, query, key, value, 0.0, True)
    return [one.detach().cpu() for one in (out, *(leaf.grad for leaf in leaves), slot, again)]  # type: ignore[union-attr]


@pytest.mark.parametrize("vendor", VENDORS, ids=str)
def test_heads_are_repeated_where_they_must_be(vendor: Vendor, with_plugins: Environment) -> None:
    """The same numbers and gradients, whether the device groups heads or has them repeated."""
    (right,) = on_processes(1, attention_and_gradients, None, True)
    ways = (None, False) if vendor is CAMBRICON else (None, True, False)
    for way in ways:
        (found,) = on_processes(1, attention_and_gradients, vendor.backend, way, environment=with_plugins(vendor))
        for one, same in zip(found, right, strict=True):
            torch.testing.assert_close(one, same)


def test_what_is_turned_down_has_a_capability_that_says_so() -> None:
    for vendor in (ASCEND, CAMBRICON):
        backend = find_backend(vendor.backend)
        assert backend.refusals
        for refusal in backend.refusals:
            assert len(refusal.source) > 20
            if refusal.capability is not None:
                assert refusal.capability in CAPABILITIES and not backend.capability(refusal.capability).value
