"""What `zili align` compares, on the CPU as the chip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planted import off_by, places
from torch import Tensor, nn

from zili.diagnosis.shadow import Shadow
from zili.ops.examples import Example
from zili.ops.registry import OPERATIONS


class Attends(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def watched(module: nn.Module, x: torch.Tensor) -> Shadow:
    shadow = Shadow(module, "cpu")
    with shadow.watching():
        module(x).sum().backward()
    return shadow


def test_torchs_fused_attention_is_compared() -> None:
    shadow = watched(Attends(), torch.randn(2, 4, 16, 8, requires_grad=True))
    assert any("flash_attention_for_cpu.default" in name for name in shadow.seen), shadow.seen
    (gradients,) = (seen for name, seen in shadow.seen.items() if name.startswith("gradients of"))
    assert gradients.calls == 3 and gradients.worst < 1
    assert shadow.offences == []


def test_a_wrong_gradient_of_a_fused_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = F.scaled_dot_product_attention, []

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 1.01

    def off(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        calls.append(query)
        # The chip is called after the CPU in both precisions; only its keys have a wrong gradient.
        return real(query, Off.apply(key) if query.requires_grad and len(calls) % 3 == 0 else key, value, *rest, **more)

    x = torch.randn(2, 4, 16, 8)
    shadow = Shadow(nn.Identity(), "cpu")
    function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    monkeypatch.setattr(F, "scaled_dot_product_attention", off)
    shadow._judge_gradients(function, {"query": x, "key": x, "value": x, "is_causal": True})
    (offence,) = shadow.offences
    assert offence.way == "backward" and offence.operation == f"gradients of {function}"


def test_what_draws_random_numbers_is_listed_as_not_compared() -> None:
    shadow = watched(nn.Dropout(0.5), torch.randn(64, requires_grad=True))
    assert "aten.bernoulli_.float" in shadow.unchecked or "aten.native_dropout.default" in shadow.unchecked
    assert shadow.offences == []


def test_an_optimizers_step_is_compared_one_parameter_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    adam = torch.optim.AdamW(model.parameters(), foreach=True)
    shadow = Shadow(model, "cpu")
    with shadow.watching():
        model(torch.randn(3, 4)).sum().backward()
        adam.step()
    calls = {name: seen.calls for name, seen in shadow.seen.items() if "_foreach_" in name}
    assert calls and all(count % 10 == 0 for count in calls.values()), calls
    assert shadow.offences == []
    reference = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    reference.load_state_dict(model.state_dict())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def small(operation: str) -> Example:
    """A call as a tiny model of width 64 makes it, in bf16."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).bfloat16().requires_grad_()

    angles = torch.outer(torch.arange(32.0), 10_000.0 ** -(torch.arange(8.0) / 8)).repeat(1, 2)
    routes = torch.randn(64, 8, generator=draw).topk(2).indices
    arguments: dict[str, tuple[Any, ...]] = {
        "linear": (normal(64, 64), normal(48, 64)),
        "rms_norm": (normal(2, 32, 64), normal(64), 1e-6),
        "add_rms_norm": (normal(2, 32, 64), normal(2, 32, 64), normal(64), 1e-6),
        "rotate": (normal(2, 32, 4, 16), angles.cos(), angles.sin()),
        "swiglu": (normal(64, 96), normal(64, 96)),
        "attention": (normal(2, 32, 4, 16), normal(2, 32, 2, 16), normal(2, 32, 2, 16)),
        "grouped_matmul": (normal(64, 64), normal(4, 48, 64), torch.tensor([10, 10, 40, 64], dtype=torch.int32)),
        "permute": (normal(64, 64), routes),
        "unpermute": (normal(128, 64), routes.flatten().argsort().argsort(), normal(64, 2)),
        "linear_cross_entropy": (normal(64, 64), normal(256, 64), torch.randint(0, 256, (64,), generator=draw)),
    }
    return Example(arguments[operation], {})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_half_a_per_cent_planted_in_a_vendors_operation_is_found(operation: str) -> None:
    case, plain = small(operation), OPERATIONS[operation]
    sound = Shadow(nn.Identity(), "cpu")
    sound.with_reference(operation, plain)(*case.arguments)
    assert sound.offences == []
    for place in places(plain, case):
        shadow = Shadow(nn.Identity(), "cpu")
        shadow.with_reference(operation, off_by(plain, 1.005, place))(*case.arguments)
        ways = {offence.way for offence in shadow.offences}
        assert ways == {"forward" if place.way == "output" else "backward"}, place
        assert shadow.seen and any(seen.worst > 1 for seen in shadow.seen.values())
