"""What a backend must do for this house to train on it: the checks that a plugin's own tests run."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isfinite

import torch

from zili import chips, ops
from zili.chips import CAPABILITIES
from zili.chips.backend import Backend
from zili.chips.device import Device
from zili.config.model import ModelConfig
from zili.diagnosis import collectives, operations, speed
from zili.diagnosis.findings import Finding, Severity
from zili.models.decoder import Decoder

_CLOSE = 1e-4
_STEPS = 5


def check_record(name: str) -> Iterator[Finding]:
    """Whether the record of backend `name` is found, and says what it must. Opens nothing."""
    backend = chips.find_backend(name)
    for capability in CAPABILITIES:
        if capability not in backend.capabilities:
            yield _wrong("record", capability, "is not stated", "state it, with what it rests on")
    for variable in backend.environment:
        if not variable.reason:
            yield _wrong("record", variable.name, "has no reason", "say why it is set")
    yield Finding("record", name, Severity.GOOD, f"{backend.device_type}, {backend.collectives}, {backend.plugin}")


def check_device(name: str) -> Iterator[Finding]:
    """Whether the device of backend `name` opens, computes rightly and trains as the CPU does. Takes a minute."""
    backend = chips.find_backend(name)
    device = Device(chips.activate(backend))
    yield from operations.examine(device)
    yield speed.examine_repeatability(device)
    yield _trains(backend, device)


def check_processes(name: str, count: int = 2, patience: float = collectives.PATIENCE) -> list[Finding]:
    """Whether `count` processes on devices of backend `name` reach one another."""
    return collectives.examine(name, count, patience)


def _trains(backend: Backend, device: Device) -> Finding:
    """A few steps of a small model, from the same weights on the same tokens, against the CPU's."""
    ops.choose("cpu", "fp32", dict.fromkeys(ops.chosen(), "reference"))
    here, there = _losses(torch.device("cpu")), _losses(device.torch)
    apart = max(abs(one - other) / one if isfinite(other) else inf for one, other in zip(here, there, strict=True))
    seen = f"losses of {_STEPS} steps within {apart:.1e} of the CPU's"
    if apart > _CLOSE:
        return _wrong("training", backend.name, seen, "zili align RECIPE names the first operation that is wrong")
    return Finding("training", backend.name, Severity.GOOD, seen, figures={"relative difference": apart})


def _losses(device: torch.device) -> list[float]:
    config = ModelConfig(
        vocab_size=256,
        hidden_size=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn_hidden_size=128,
        max_length=64,
        init_std=0.06,
    )
    model = Decoder(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(_STEPS):
        tokens = torch.randint(0, 256, (4, 65), generator=draw).to(device)
        loss = model.loss_sum(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def _wrong(area: str, name: str, seen: str, fix: str) -> Finding:
    return Finding(area, name, Severity.BROKEN, seen, fix)
