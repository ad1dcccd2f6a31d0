"""What `zili align` compares, on the CPU as the chip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zili.diagnosis.shadow import Shadow


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
