"""A model small enough to be trained as a check, on one device and over many processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf, isfinite

import torch
from torch import Tensor

from zili.config.model import ModelConfig
from zili.models.decoder import Decoder
from zili.parallel.data import apply_sharding, sharded
from zili.parallel.model import plain
from zili.parallel.world import World

_CONFIG = ModelConfig(
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
_ROWS = 4


def losses(device: torch.device | str, steps: int) -> list[float]:
    """Mean losses of so many steps of training on made-up tokens, the same everywhere."""
    model = Decoder(_CONFIG).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _, (ids, labels) in zip(range(steps), _batches(_ROWS), strict=False):
        loss = model.loss_sum(ids.to(device), labels.to(device)) / labels.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def one_step(rows: int) -> tuple[float, float]:
    """Summed loss, and squared norm of its gradient, of so many rows on the CPU."""
    return _step(Decoder(_CONFIG), *next(_batches(rows)))


def one_step_sharded(world: World) -> tuple[float, float]:
    """The same of a row a process, by weights that all of them share."""
    with torch.device("meta"):
        model = Decoder(_CONFIG)
    apply_sharding(model, world, torch.float32)
    assert sharded(model), "nothing was sharded"
    model.to_empty(device=world.device.torch)
    model.init_weights(0)
    ids, labels = (rows[world.rank : world.rank + 1].to(world.device.torch) for rows in next(_batches(world.size)))
    loss, squared = world.sum(torch.tensor(_step(model, ids, labels), device=world.device.torch)).tolist()
    return loss, squared


def largest_difference(found: Iterable[float], wanted: Iterable[float]) -> float:
    """Relative; inf where one of `found` is no finite number."""
    pairs = zip(found, wanted, strict=True)
    return max(abs(ours - cpus) / abs(cpus) if isfinite(ours) else inf for ours, cpus in pairs)


def _step(model: Decoder, ids: Tensor, labels: Tensor) -> tuple[float, float]:
    loss = model.loss_sum(ids, labels)
    loss.backward()
    gradients = [plain(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    return float(loss.detach()), sum(float(gradient.square().sum()) for gradient in gradients)


def _batches(rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless ids and labels `[rows, S]`."""
    draw = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(0, _CONFIG.vocab_size, (rows, _CONFIG.max_length + 1), generator=draw, device="cpu")
        yield tokens[:, :-1], tokens[:, 1:]
