"""What `zili align` compares, on the CPU as the chip."""

from __future__ import annotations

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
    assert shadow.offences == []


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
