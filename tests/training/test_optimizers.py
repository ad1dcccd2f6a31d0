"""Who moves which weights, and one step of each optimizer by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from zili.config import ModelConfig
from zili.config.run import OptimizerConfig
from zili.models.arithmetic import training_state_bytes
from zili.models.decoder import Decoder
from zili.objectives import learner
from zili.training.muon import Muon
from zili.training.optimizers import build_optimizers, set_learning_rate

SHAPE = {"vocab_size": 50, "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16}
MATRICES = {"attention": ["query", "key", "value", "output"], "feed_forward": ["gate", "up", "down"]}
IN_BLOCKS = {f"layers.{i}.{part}.{name}.weight" for i in (0, 1) for part, names in MATRICES.items() for name in names}
MIXTURE = {"experts": 4, "top_k": 2, "ffn_hidden_size": 24, "bias": True, "scoring": "sigmoid"}


def decoder(**changes: object) -> Decoder:
    return learner(ModelConfig.model_validate({**SHAPE, "ffn_hidden_size": 48, **changes}))


def names_of(model: Decoder, group: dict[str, list[Tensor]]) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is mine for mine in group["params"])}


def built(model: Decoder, **settings: object) -> list[Optimizer]:
    return build_optimizers(list(model.named_parameters()), OptimizerConfig.model_validate(settings))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_owner(name: str, tied: bool) -> None:
    model = decoder(tied_embeddings=tied, qkv_bias=True)
    owned = [id(p) for o in built(model, name=name) for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = decoder(qkv_bias=True, ffn_down_bias=True)
    muon, adamw = built(model, name="muon")
    assert isinstance(muon, Muon) and isinstance(adamw, AdamW)
    assert names_of(model, muon.param_groups[0]) == IN_BLOCKS
    decayed, spared = (names_of(model, group) for group in adamw.param_groups)
    assert decayed == {"embedding.weight", "head.weight"}
    assert spared == {name for name, p in model.named_parameters() if p.ndim == 1}


def test_muon_takes_the_block_of_multi_token_prediction_too() -> None:
    model = decoder(mtp_layers=1)
    muon, adamw = built(model, name="muon")
    block = {name.replace("layers.0", "next_tokens.block") for name in IN_BLOCKS if name.startswith("layers.0")}
    assert names_of(model, muon.param_groups[0]) == IN_BLOCKS | block | {"next_tokens.projection.weight"}
    assert names_of(model, adamw.param_groups[0]) == {"embedding.weight", "head.weight"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adapters_are_one_optimizer_s(name: str) -> None:
    model = decoder(lora={"rank": 2})
    (only,) = built(model, name=name)
    assert isinstance(only, Muon if name == "muon" else AdamW)
    given = {key: torch.ones_like(p) if p.requires_grad else None for key, p in model.named_parameters()}
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for key, p in model.named_parameters():
        p.grad = given[key]
    only.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {key for key, gradient in given.items() if gradient is not None} != set()


@pytest.mark.parametrize("changes", [{}, {"mtp_layers": 1}, {"lora": {"rank": 2}}, {"mixture": MIXTURE}])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_optimizers_keep_is_what_was_counted(name: str, changes: dict[str, object]) -> None:
    model = decoder(**changes)
    optimizers = built(model, name=name)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    kept = sum(t.nbytes for state in states for key, t in state.items() if key != "step")
    assert training_state_bytes(model.config, optimizer=name).optimizer == kept


def test_adamw_decays_matrices_and_spares_norms_and_biases() -> None:
    model = decoder(qkv_bias=True)
    (adamw,) = built(model, weight_decay=0.3)
    decayed, spared = adamw.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert names_of(model, decayed) == IN_BLOCKS | {"embedding.weight", "head.weight"}
    assert names_of(model, spared) == {
        name for name, p in model.named_parameters() if name.endswith(("norm.weight", "bias"))
    }


def gradients(model: Decoder, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def step(model: Decoder, optimizers: list[Optimizer], by_name: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.grad = by_name[name].clone()
    for optimizer in optimizers:
        optimizer.step()


def test_two_adamw_steps_are_the_papers() -> None:
    # Loshchilov and Hutter 2019, algorithm 2, in float64.
    rate, (b1, b2), eps, decay = 0.01, (0.8, 0.95), 1e-6, 0.1
    model = decoder()
    optimizers = built(model, learning_rate=rate, betas=(b1, b2), eps=eps, weight_decay=decay)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t, share in ((1, 1.0), (2, 0.5)):
        set_learning_rate(optimizers, share)
        given = gradients(model, t)
        step(model, optimizers, given)
        for name, weight in expected.items():
            g = given[name].double()
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            move = (first[name] / (1 - b1**t)) / ((second[name] / (1 - b2**t)).sqrt() + eps)
            own_decay = decay if weight.ndim == 2 else 0.0
            expected[name] = weight - share * rate * (move + own_decay * weight)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def muon_updates() -> dict[str, tuple[Tensor, Tensor]]:
    """(gradient, update at rate 1) of every matrix of the blocks, after one Muon step without decay."""
    model = decoder()
    optimizers = built(model, name="muon", learning_rate=0.01, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = gradients(model, 0)
    step(model, optimizers, given)
    return {
        name: (given[name], (before[name] - p.detach()) / 0.01)
        for name, p in model.named_parameters()
        if name in IN_BLOCKS
    }


@pytest.mark.parametrize("name", sorted(IN_BLOCKS))
def test_a_muon_step_is_the_orthogonal_factor_at_adamws_size(
    muon_updates: dict[str, tuple[Tensor, Tensor]], name: str
) -> None:
    gradient, update = muon_updates[name]
    scale = 0.2 * max(gradient.shape) ** 0.5  # Liu et al. 2025, eq. 4
    # Jordan's Newton-Schulz: five times an odd quintic on every singular value of G / |G|, here in float64.
    values = torch.linalg.svdvals(gradient.double() / gradient.double().norm())
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    factors = torch.linalg.svdvals(update / scale).double()
    torch.testing.assert_close(factors, values.sort(descending=True).values, rtol=0, atol=0.03)  # torch's runs in bf16
    assert float(factors.min()) > 0.6 and float(factors.max()) < 1.25
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.cosine_similarity((left @ right).flatten(), update.flatten(), dim=0) > 0.97


def test_muons_rate_and_decay_follow_the_schedule() -> None:
    model = decoder()
    optimizers = built(model, name="muon", learning_rate=0.02, weight_decay=0.5)
    set_learning_rate(optimizers, 0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizers, {name: torch.zeros_like(p) for name, p in before.items()})
    for name, p in model.named_parameters():  # no gradient: what is left is decay, 0.02 * 0.25 * 0.5
        kept = 1 - 0.0025 if p.ndim == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * kept, rtol=1e-6, atol=0)


def test_muon_is_torchs_own_bit_for_bit_and_takes_stacks_of_matrices() -> None:
    torch.manual_seed(0)
    shapes = [(32, 16), (16, 48), (32, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    stack = nn.Parameter(torch.stack([ours[0].detach(), ours[2].detach()]))
    rates = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    mine = Muon([*ours, stack], **rates)
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **rates)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        stack.grad = torch.stack([ours[0].grad, ours[2].grad])  # type: ignore[list-item]
        mine.step()
        torchs.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(stack, torch.stack([ours[0], ours[2]]))
