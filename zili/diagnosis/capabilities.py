"""Tries each capability: what the chip's record says, what was seen, and what follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from zili.chips import CAPABILITIES
from zili.chips.device import Device
from zili.diagnosis import small_model
from zili.diagnosis.findings import Finding, Severity
from zili.diagnosis.speed import numbers, repeats
from zili.ops import product, reference
from zili.ops.examples import example
from zili.ops.yardstick import Distance, compared, distance, first_line
from zili.parallel.layout import Layout
from zili.parallel.world import World
from zili.torch_private import dispatch_key_for_device, has_kernel

AREA = "capabilities"
# The second name is the one before torch 2.13: with an older torch a chip can be examined too.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_CLOSE = 1e-4


class Trial(NamedTuple):
    """What came of trying."""

    works: bool
    what: str
    slow: bool = False
    """It works, but a run is faster without it."""


def examine(device: Device) -> Iterator[Finding]:
    """A verdict on every capability that one device can show."""
    for name, probe in _ON_ONE.items():
        yield verdict(device, name, _tried(partial(probe, device)))


def examine_together(device: Device, count: int) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Capabilities that take `count` processes, each by name and how to get its verdict; all processes take part."""
    for name, probe in _TOGETHER.items():
        yield name, partial(_verdict_together, device, name, partial(probe, device, count))


def _verdict_together(device: Device, name: str, probe: Callable[[], Trial]) -> Finding:
    return verdict(device, name, _tried(probe))


def _tried(probe: Callable[[], Trial]) -> Trial:
    try:
        return probe()
    except Exception as error:  # what a chip cannot do may raise anything
        return Trial(False, f"fails: {first_line(error)}")


def verdict(device: Device, name: str, seen: Trial) -> Finding:
    """What was seen against what the record says of capability `name`."""
    said = device.capability(name)
    otherwise, figures = CAPABILITIES[name].otherwise, {"works": float(seen.works and not seen.slow)}
    record = f"the record says {'yes' if said.value else 'no'}: {said.reason}"
    if seen.works and said.value and not seen.slow:
        return Finding(AREA, name, Severity.GOOD, seen.what, figures=figures)
    if seen.works and not said.value and not seen.slow:
        fix = f"chip.capabilities.{name} = true lets runs use it"
        return Finding(AREA, name, Severity.FALLBACK, f"{seen.what}; {record}; {otherwise}", fix, figures)
    if not said.value:
        return Finding(AREA, name, Severity.FALLBACK, f"{seen.what}; {record}; {otherwise}", figures=figures)
    severity = Severity.FALLBACK if seen.slow else _WITHOUT.get(name, Severity.BROKEN)
    fix = f"set chip.capabilities.{name} = false: {otherwise}"
    return Finding(AREA, name, severity, f"{seen.what}; {record}", fix, figures)


_WITHOUT = {"deterministic": Severity.DEGRADED}
"""How bad it is that a capability is missing of which the record says yes, where not every run would meet it."""


def _bf16(device: Device) -> Trial:
    found = compared(reference.linear, reference.linear, *example("linear", "cpu", torch.bfloat16), device.torch)
    if problem := _problem(found):
        return Trial(False, problem)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = numbers(device, 1024, 1024, dtype=dtype)
        seconds[dtype] = min(_seconds(partial(torch.mm, a, a), device) for _ in range(5))
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    return Trial(True, f"products are right, at {ratio:.2g} times the speed of fp32", slow=ratio < 1)


def _seconds(work: Callable[[], object], device: Device) -> float:
    device.synchronize()
    started = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - started


def _problem(found: dict[str, Distance]) -> str | None:
    return next((f"wrong: {way} is {measured}" for way, measured in found.items() if not measured.fits), None)


def _fused_adamw(device: Device) -> Trial:
    """Three steps against the plain loop on the CPU."""
    draw = torch.Generator().manual_seed(3)
    first, gradients = torch.randn(64, 33, generator=draw), torch.randn(3, 64, 33, generator=draw)

    def trained(place: torch.device | str, dtype: torch.dtype, fused: bool) -> Tensor:
        weight = nn.Parameter(first.to(place, dtype, copy=True))
        optimizer = torch.optim.AdamW([weight], lr=0.01, fused=fused, foreach=False)
        for gradient in gradients:
            weight.grad = gradient.to(place, dtype)
            optimizer.step()
        return weight.detach()

    found = trained(device.torch, torch.float32, True)
    off = distance(found, trained("cpu", torch.float32, False), trained("cpu", torch.float64, False))
    return Trial(off.fits, f"weights after three steps are {off}" if not off.fits else f"{off.ulps:.2g} ulp")


def _grouped_matmul(device: Device) -> Trial:
    dtype = torch.bfloat16 if device.capability("bf16").value else torch.float32
    inputs = example("grouped_matmul", "cpu", dtype)
    found = compared(product.grouped, reference.grouped_matmul, *inputs, device.torch)
    largest = max(measured.ulps for measured in found.values())
    seen = f"{largest:.2g} ulp in {str(dtype).removeprefix('torch.')}"
    key = dispatch_key_for_device(device.type)
    if device.type != "cpu" and not has_kernel("aten::_grouped_mm", key):
        seen += ", by torch's stand-in for a kernel, which makes the host wait"
    return Trial(not _problem(found), _problem(found) or seen)


def _grouped_heads_attention(device: Device) -> Trial:
    """Six query heads and two of keys and values, forward and backward."""
    dtype = torch.bfloat16 if device.capability("bf16").value else torch.float32

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    inputs = example("attention", "cpu", dtype).arguments
    found = compared(attention, attention, inputs, {}, device.torch)
    return Trial(not _problem(found), _problem(found) or f"{max(one.ulps for one in found.values()):.2g} ulp")


def _inf_nan(device: Device) -> Trial:
    large, zero = torch.full((8, 8), 3e38, device=device.torch), torch.zeros(8, 8, device=device.torch)
    results = {"3e38 * 10": large * 10, "a product of 3e38": large @ large, "exp(100)": (zero + 100).exp()}
    missing = [what for what, result in results.items() if not bool(result.cpu().isinf().all())]
    missing += ["0 / 0"] if not bool((zero / zero).cpu().isnan().all()) else []
    return Trial(not missing, f"{', '.join(missing)}: finite" if missing else "overflow is inf, 0 / 0 is nan")


def _compile(device: Device) -> Trial:
    gate, up = (torch.linspace(-3, 3, 512, device=device.torch).view(16, 32).requires_grad_() for _ in range(2))
    started = time.perf_counter()
    compiled = torch.compile(lambda gate, up: F.silu(gate) * up, dynamic=False)
    compiled(gate, up).sum().backward()
    seconds, ours = time.perf_counter() - started, gate.grad
    gate.grad = None
    (F.silu(gate) * up).sum().backward()
    assert ours is not None and gate.grad is not None
    right = torch.allclose(ours.cpu(), gate.grad.cpu(), atol=1e-5)
    return Trial(right, f"a small function in {seconds:.0f} s" if right else "gradients differ from the eager ones")


def _deterministic(device: Device) -> Trial:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        same = repeats(device)
    finally:
        torch.use_deterministic_algorithms(before)
    return Trial(same, "the same bits five times" if same else "other bits from time to time")


def _bf16_reduce(device: Device, count: int) -> Trial:
    """Small whole numbers, whose sums bf16 has exactly."""
    own = torch.full((64 * count,), float(dist.get_rank() + 1), dtype=torch.bfloat16, device=device.torch)
    part = torch.zeros(64, dtype=torch.bfloat16, device=device.torch)
    reduce_scatter(part, own)
    dist.all_reduce(own)
    right = bool((own == count * (count + 1) / 2).all()) and bool((part == count * (count + 1) / 2).all())
    return Trial(right, "all_reduce and reduce_scatter are right" if right else "wrong sums")


def _fsdp2(device: Device, count: int) -> Trial:
    """A step of a small model whose weights all processes share, against the CPU's."""
    world = World(Layout(shards=count), device)
    apart = small_model.largest_difference(small_model.one_step_sharded(world), small_model.one_step(count))
    return Trial(apart <= _CLOSE, f"loss and gradient over {count} processes within {apart:.1e} of the CPU's")


_ON_ONE: dict[str, Callable[[Device], Trial]] = {
    "bf16": _bf16,
    "fused_adamw": _fused_adamw,
    "grouped_matmul": _grouped_matmul,
    "grouped_heads_attention": _grouped_heads_attention,
    "inf_nan": _inf_nan,
    "compile": _compile,
    "deterministic": _deterministic,
}
_TOGETHER: dict[str, Callable[[Device, int], Trial]] = {"bf16_reduce": _bf16_reduce, "fsdp2": _fsdp2}
