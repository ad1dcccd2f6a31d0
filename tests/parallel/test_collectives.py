"""Collectives and their gradients against the same sums computed in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from many import on_processes
from tiny_models import slow
from torch import Tensor

from zili.parallel.collectives import AllSum, Communicator, exchange, gather, scatter_sum

SHAPE = (4, 8, 3)
"""Its first two dimensions are divided by 2 and 4."""
WIDTH = 5
# How many rows process p sends to process q; none at all from one, and none at all to one.
ROWS = {
    2: [[3, 0], [4, 2]],
    4: [[2, 0, 1, 5], [0, 0, 0, 0], [3, 0, 0, 1], [1, 0, 2, 4]],
}


def made(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def forward_and_back(x: Tensor, call: Callable[[Tensor], Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Value of `call(x)`, and the gradient of its sum weighted by made-up numbers."""
    x = x.clone().requires_grad_()
    y = call(x)
    y.backward(made(*y.shape, seed=seed))
    assert x.grad is not None
    return y.detach(), x.grad


def all_here(size: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    communicator = Communicator(group)
    x, weights = made(*SHAPE, seed=rank), 100 + rank
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for dimension in (0, 1):
        for name, collective in (("gather", gather), ("scatter_sum", scatter_sum)):
            call = partial(collective, dimension=dimension, communicator=communicator)
            found[f"{name} {dimension}"] = forward_and_back(x, call, weights)
    # Views whose memory is not in order, as attention's are.
    found["gather turned"] = forward_and_back(x, lambda x: gather(x.transpose(0, 1), 1, communicator), weights)
    found["all_sum"] = forward_and_back(x, lambda x: AllSum.apply(x, group), 100)
    to, back = ROWS[size][rank], [row[rank] for row in ROWS[size]]
    rows = made(sum(to), WIDTH, seed=rank)
    found["exchange"] = forward_and_back(rows, lambda x: exchange(x, to, back, group), weights)
    found["there and back"] = forward_and_back(
        rows, lambda x: exchange(2 * exchange(x, to, back, group), back, to, group), weights
    )
    # As arrays: a tensor would share its memory with the reader, and this process ends.
    return {name: (value.numpy(), gradient.numpy()) for name, (value, gradient) in found.items()}


@pytest.fixture(scope="module", params=[2, slow(4)])
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What every process has of every collective."""
    return on_processes(request.param, all_here, request.param)


def expected(found: list[Any], call: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> list[Any]:
    """The same in one process: `call` from the inputs of all processes to the outputs of all."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = call(leaves)
    sum(((y * made(*y.shape, seed=100 + rank)).sum() for rank, y in enumerate(outputs)), torch.zeros(())).backward()
    return [(y.detach(), leaf.grad) for y, leaf in zip(outputs, leaves, strict=True)]


def assert_alike(found: list[dict[str, Any]], name: str, wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    for own, (value, gradient) in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(own[name][0]), value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.from_numpy(own[name][1]), gradient, rtol=1e-12, atol=1e-12)


def inputs_of(found: list[Any]) -> list[Tensor]:
    return [made(*SHAPE, seed=rank) for rank in range(len(found))]


@pytest.mark.parametrize("dimension", [0, 1])
def test_gather_joins_and_its_gradient_is_the_sum_of_each_part(found: list[Any], dimension: int) -> None:
    wanted = expected(found, lambda xs: [torch.cat(xs, dimension)] * len(xs), inputs_of(found))
    assert_alike(found, f"gather {dimension}", wanted)


def test_gather_takes_a_view(found: list[Any]) -> None:
    wanted = expected(found, lambda xs: [torch.cat([x.transpose(0, 1) for x in xs], 1)] * len(xs), inputs_of(found))
    assert_alike(found, "gather turned", wanted)


@pytest.mark.parametrize("dimension", [0, 1])
def test_scatter_sum_adds_up_and_its_gradient_is_that_of_every_part(found: list[Any], dimension: int) -> None:
    def scattered(xs: list[Tensor]) -> list[Tensor]:
        return list(torch.stack(xs).sum(0).chunk(len(xs), dimension))

    assert_alike(found, f"scatter_sum {dimension}", expected(found, scattered, inputs_of(found)))


def test_all_sum_passes_its_gradient_as_it_is(found: list[Any]) -> None:
    total = sum(inputs_of(found), torch.zeros(()))
    assert_alike(found, "all_sum", [(total, made(*SHAPE, seed=100))] * len(found))


def test_exchange_brings_each_process_its_rows_in_the_order_of_senders(found: list[Any]) -> None:
    size = len(found)
    sizes = ROWS[size]

    def exchanged(xs: list[Tensor]) -> list[Tensor]:
        sent = [x.split(to) for x, to in zip(xs, sizes, strict=True)]
        return [torch.cat([sent[source][target] for source in range(size)]) for target in range(size)]

    inputs = [made(sum(to), WIDTH, seed=rank) for rank, to in enumerate(sizes)]
    assert_alike(found, "exchange", expected(found, exchanged, inputs))
    assert_alike(found, "there and back", expected(found, lambda xs: [2 * x for x in xs], inputs))
