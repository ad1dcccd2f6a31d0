"""How fast a device computes and moves bytes, whether it repeats itself, and how fast checkpoints reach the disk."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F

from zili import ops
from zili.chips.device import Device
from zili.diagnosis.findings import Finding, Severity
from zili.ops.yardstick import first_line
from zili.training.throughput import fastest_call

_SIZES = (256, 512, 1024, 2048, 4096)
_PATIENCE = 0.6
"""Seconds: no product is tried that would take longer."""
_COPY = 256 << 20
"""Bytes; some chips have caches of 192 MB."""
_DISK = 128 << 20
_DRAWN = 32 << 20
"""Numbers; more are those again."""


def examine_speed(device: Device) -> Iterator[Finding]:
    """Matrix products by size, memory, and copies between host and device."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        try:
            curve = _matmul_curve(device, dtype)
        except (RuntimeError, NotImplementedError) as error:
            yield Finding("speed", f"matmul {name}", Severity.FALLBACK, first_line(error))
            continue
        best = max(curve.values())
        shown = ", ".join(f"{size}: {flops / 1e12:.3g}" for size, flops in curve.items())
        peak = _published(device, name)
        share = f"; {100 * best / peak:.0f} % of its published peak" if peak else ""
        figures = {f"{size} FLOP/s": flops for size, flops in curve.items()} | ({"peak FLOP/s": peak} if peak else {})
        yield Finding("speed", f"matmul {name}", Severity.GOOD, f"TFLOP/s by size: {shown}{share}", figures=figures)
    yield _memory(device)
    if device.type != "cpu":
        yield from _copies(device)


def numbers(device: Device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What speeds are measured with: normally distributed, as training's numbers are.

    Of ones or zeros fewer bits flip, so that a chip takes less power and keeps a higher clock. The same product ran at
    295 TFLOP/s with zeros and 257 with these (He 2024, "Strangely, Matrix Multiplications on GPUs Run Faster When Given
    'Predictable' Data"). And what can pack or skip them does.
    """
    draw = torch.Generator().manual_seed(0)
    few = torch.randn(min(prod(shape), _DRAWN), generator=draw)
    # Drawing hundreds of millions takes longer than measuring with them.
    return few.repeat(-(-prod(shape) // _DRAWN))[: prod(shape)].view(shape).to(device.torch, dtype)


def _matmul_curve(device: Device, dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s by size, up to a size that takes too long."""
    curve: dict[int, float] = {}
    with torch.no_grad():
        for size in _SIZES:
            a, b = numbers(device, 2, size, size, dtype=dtype)
            seconds = fastest_call(lambda a=a, b=b: ops.linear(a, b), device)  # type: ignore[misc]
            curve[size] = 2 * size**3 / seconds
            if 8 * seconds > _PATIENCE:
                break
    return curve


def _published(device: Device, precision: str) -> float | None:
    figure = device.chip.figure(f"{precision}_tflops") if device.chip else None
    return figure.value * 1e12 if figure else None


def _memory(device: Device) -> Finding:
    a = numbers(device, _COPY // 4)
    b = torch.empty_like(a)
    rate = 2 * _COPY / fastest_call(lambda: torch.mul(a, 2.0, out=b), device)
    return Finding("speed", "memory", Severity.GOOD, f"{rate / 1e9:.3g} GB/s", figures={"bytes/s": rate})


def _copies(device: Device) -> Iterator[Finding]:
    there = numbers(device, _COPY // 4)
    host = there.cpu()
    for name, work in (("host to device", lambda: there.copy_(host)), ("device to host", lambda: host.copy_(there))):
        rate = _COPY / fastest_call(work, device)
        yield Finding("speed", name, Severity.GOOD, f"{rate / 1e9:.3g} GB/s", figures={"bytes/s": rate})


def repeats(device: Device) -> bool:
    """Five times the same, of what adds up in no fixed order: gradients of an embedding, scattered sums, products."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 16, (4096,), generator=draw).to(device.torch)
    table, rows = torch.randn(16, 64, generator=draw), torch.randn(4096, 64, generator=draw).to(device.torch)

    def once() -> torch.Tensor:
        weight = table.to(device.torch, copy=True).requires_grad_()
        (F.embedding(ids, weight) * rows).sum().backward()
        assert weight.grad is not None
        scattered = torch.zeros(16, 64, device=device.torch).index_add_(0, ids, rows)
        return torch.cat([weight.grad, scattered, rows.t() @ rows]).cpu()

    first = once()
    return all(torch.equal(first, once()) for _ in range(4))


def examine_repeatability(device: Device) -> Finding:
    """Whether the same sums twice give the same bits."""
    said = device.capability("deterministic")
    if repeats(device):
        return Finding("repeatability", "sums", Severity.GOOD, "the same bits five times")
    return Finding(
        *("repeatability", "sums", Severity.DEGRADED, f"other bits from time to time ({said.reason})"),
        "set chip.deterministic = true where exact repetition matters",
    )


def examine_disk(folder: Path) -> Finding:
    """Bytes a second that are on the disk for good, as a checkpoint writes them, and read back."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="zili-doctor-") as file:
            started = time.perf_counter()
            for _ in range(_DISK // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = _DISK / (time.perf_counter() - started)
            file.seek(0)
            started = time.perf_counter()
            while file.read(len(block)):
                pass
            read = _DISK / (time.perf_counter() - started)
    except OSError as error:
        return Finding("disk", str(folder), Severity.BROKEN, f"cannot be written: {error}", "choose another --folder")
    return Finding(
        *(
            "disk",
            str(folder),
            Severity.GOOD,
            f"{written / 1e6:.0f} MB/s to the disk, {read / 1e6:.0f} MB/s back (cached)",
        ),
        figures={"written bytes/s": written, "read bytes/s": read},
    )
