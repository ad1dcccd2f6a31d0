"""The compiled kernels against PyTorch's operations."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from many import on_processes

from zili import ops
from zili.config.model import ModelConfig
from zili.serving.cpu.kernels import Kernels, compiled

SHAPES = {"grouped": (6, 2, 24), "one key head": (4, 1, 64), "a key head each": (3, 3, 10)}
"""Heads, key heads, size of a head."""
CLOSE = {torch.float32: {"rtol": 2e-6, "atol": 2e-6}, torch.bfloat16: {"rtol": 2**-8, "atol": 1e-6}}
SLOTS, CONTEXT = 5, 700


def config(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=96, hidden_size=32, layers=1, heads=heads, kv_heads=kv_heads, head_dim=head_dim, ffn_hidden_size=48
    )


@cache
def made(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Kernels:
    kernels = compiled(config(heads, kv_heads, head_dim), dtype)
    assert kernels is not None
    return kernels


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what a process has loaded")
def test_the_kernels_threads_are_torchs(dtype: torch.dtype) -> None:
    """One OpenMP in the process: a second would have threads of its own, that no setting of torch's reaches."""
    (found,) = on_processes(1, openmps_beside_kernels, dtype)
    assert len(found) == 1, found


def openmps_beside_kernels(dtype: torch.dtype) -> set[str]:
    """Libraries of OpenMP that this process has once it has kernels."""
    made(6, 2, 24, dtype)
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {name for name in loaded if "libgomp" in name or "libomp" in name or "libiomp" in name}


@pytest.fixture(params=CLOSE, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return SHAPES[request.param]


@pytest.fixture
def kernels(shape: tuple[int, int, int], dtype: torch.dtype) -> Kernels:
    return made(*shape, dtype)


def drawn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(*size, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16, 64, 65, 150])
@pytest.mark.parametrize(("width", "out"), [(5, 3), (64, 24), (33, 200)])
def test_product(dtype: torch.dtype, rows: int, width: int, out: int) -> None:
    kernels = made(*SHAPES["grouped"], dtype)
    x, weight, bias = drawn(2, rows, width, dtype=dtype)[1:], drawn(out, width, dtype=dtype, seed=1), drawn(out, seed=2)
    laid_out, other = kernels.laid_out(weight), drawn(out, rows, dtype=dtype, seed=3).T[None]
    plain = x.double() @ weight.double().T
    close = {**CLOSE[dtype], "atol": 1e-5 * width}
    torch.testing.assert_close(kernels.product(x, laid_out, out, None).double(), plain, **close)
    torch.testing.assert_close(kernels.product(x, laid_out, out, bias).double(), plain + bias, **close)
    torch.testing.assert_close(kernels.product(x, laid_out, out, None, other).double(), plain + other, **close)


@pytest.mark.parametrize("size", [(1, 1, 7), (1, 16, 576), (1, 40, 600)])
def test_norm(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    kernels = made(*SHAPES["grouped"], dtype)
    x, weight = drawn(*size, dtype=dtype), drawn(size[-1], seed=1)
    expected = F.rms_norm(x.float(), weight.shape, weight, 1e-5)
    torch.testing.assert_close(kernels.norm(x, weight, 1e-5).float(), expected, **CLOSE[dtype])


@pytest.mark.parametrize("size", [(1, 1, 14), (1, 40, 600)])
def test_swiglu(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    kernels = made(*SHAPES["grouped"], dtype)
    joined = drawn(*size, dtype=dtype) * 20
    joined[0, 0, :4] = torch.tensor([-200.0, 200, 0, -1e-3])
    gate, up = joined.float().chunk(2, -1)
    torch.testing.assert_close(kernels.swiglu(joined).float(), F.silu(gate) * up, **CLOSE[dtype])


@pytest.mark.parametrize("positions", [[0], [3, 0, 699, 130, 64], [17, 18, 19]])
def test_attention(kernels: Kernels, shape: tuple[int, int, int], dtype: torch.dtype, positions: list[int]) -> None:
    """Of tokens in slots drawn at random, whose keys are placed first."""
    heads, kv_heads, size = shape
    count = len(positions)
    keys = drawn(SLOTS, kv_heads, CONTEXT, size, dtype=dtype)
    values = drawn(SLOTS, kv_heads, CONTEXT, size, dtype=dtype, seed=1)
    joined = drawn(1, count, (heads + 2 * kv_heads) * size, dtype=dtype, seed=2)
    angles = drawn(count, size // 2, seed=3).repeat(1, 2)
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(4))[:count]
    where = torch.tensor(positions)
    rows = ((slots[:, None] * kv_heads + torch.arange(kv_heads)) * CONTEXT + where[:, None]).flatten()

    split = joined.clone().unflatten(-1, (-1, size))
    turned = ops.rotate(split[:, :, :-kv_heads].float(), angles.cos(), angles.sin())[0]
    expected_keys, expected_values = keys.clone(), values.clone()
    for token, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        expected_keys[slot, :, position] = turned[token, heads:]
        expected_values[slot, :, position] = split[0, token, -kv_heads:]

    kernels.place(joined, angles.cos(), angles.sin(), rows, keys, values)
    query = joined[0].unflatten(-1, (-1, size))[:, :heads]
    torch.testing.assert_close(query.float(), turned[:, :heads].float(), **CLOSE[dtype])
    torch.testing.assert_close(keys.float(), expected_keys.float(), **CLOSE[dtype])
    assert torch.equal(values, expected_values)

    found = kernels.attend(query, where, rows, keys, values)
    for token, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        one = query[None, token, :, None].float()
        before = (kept[slot, None, :, : position + 1].float() for kept in (keys, values))
        expected = F.scaled_dot_product_attention(one, *before, enable_gqa=True)[0, :, 0]
        torch.testing.assert_close(found[token].float(), expected, rtol=CLOSE[dtype]["rtol"], atol=1e-5)


def test_numbers_that_are_none_are_not_hidden(dtype: torch.dtype) -> None:
    kernels = made(1, 1, 8, dtype)
    for bad in (math.nan, math.inf):
        x = drawn(1, 2, 16, dtype=dtype)
        x[0, 1, 3] = bad
        product = kernels.product(x, kernels.laid_out(drawn(3, 16, dtype=dtype)), 3, None)
        assert not product[0, 1].isfinite().any() and product[0, 0].isfinite().all()
        assert not kernels.norm(x, torch.ones(16), 1e-5)[0, 1].isfinite().all()
        assert not kernels.swiglu(x)[0, 1].isfinite().all()
        assert kernels.norm(x, torch.ones(16), 1e-5)[0, 0].isfinite().all()
        keys, values = drawn(1, 1, 9, 8, dtype=dtype), drawn(1, 1, 9, 8, dtype=dtype)
        for damaged in (keys, values):
            kept = damaged.clone()
            damaged[0, 0, 2, 5] = bad
            found = kernels.attend(x[:1, :1, :8], torch.tensor([8]), torch.tensor([8]), keys, values)
            assert not found.isfinite().all()
            damaged.copy_(kept)


def test_nowhere_to_compile(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def nowhere() -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.TemporaryDirectory", nowhere)
    assert compiled(config(*SHAPES["grouped"]), torch.float32) is None
    assert "no usable temporary directory" in caplog.text


@pytest.mark.parametrize(("compiler", "reason"), [("no-such-compiler", "No such file"), ("false", "exit status 1")])
def test_without_a_compiler(
    compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert compiled(config(*SHAPES["grouped"]), torch.float32) is None
    told = caplog.text
    assert "answers come slower" in told and reason in told


def test_what_there_is_no_kernel_for() -> None:
    assert compiled(config(*SHAPES["grouped"]), torch.float16) is None
