"""Published code's own logits, losses, gradients and greedy ids, through `zili.load`.

They are in ../shared/golden, and tiny ones in every clone: make_goldens.py says what made those.
"""

import re

import pytest
import torch
from published_folders import DENSE, golden_folder
from safetensors.torch import load_file

import zili
from zili.ops import IGNORE_INDEX

LAYER = re.compile(r"(?:transformer\.|model\.)?(?:h|layers)\.(\d+)\.")


@pytest.fixture(params=DENSE)
def golden(request):
    folder = golden_folder(request.param)
    return zili.load(folder), load_file(folder / "golden.safetensors")


@pytest.fixture(params=["telechat3-moe", "deepseek"])
def mixture(request):
    """TeleChat3-105B-A4.7B's architecture; its reference is transformers, with its own eps in the low-rank norms."""
    folder = golden_folder(request.param)
    model = zili.load(folder)
    for name, module in model.named_modules():
        if name.endswith(("query_norm", "key_value_norm")):
            module.eps = 1e-6
    return model, load_file(folder / "golden.safetensors")


@torch.no_grad()
def greedy(model, ids, *, cached, exact=True, steps=16):
    """Ids `[B, steps]` continuing `ids [B, S]`."""
    cache = model.new_cache(*ids.shape[:1], ids.shape[1] + steps, exact=exact) if cached else None
    sequence = new = ids
    for _ in range(steps):
        new = model(new if cached else sequence, cache=cache)[:, -1:].argmax(-1)
        sequence = torch.cat((sequence, new), dim=1)
    return sequence[:, ids.shape[1] :]


def published_gradient(model, name):
    """The gradient of a published tensor, put together from ours."""
    if name.endswith(("word_embeddings.weight", "embed_tokens.weight")):
        return model.embedding.weight.grad
    layer = model.layers[int(LAYER.match(name)[1])]
    attention = layer.attention
    if name.endswith("mlp.gate.weight"):
        return layer.feed_forward.router.weight.grad
    if name.endswith("kv_b_proj.weight"):
        return attention.key_value_up.weight.grad
    if name.endswith("k_proj.weight"):
        return attention.key.weight.grad
    assert name.endswith("self_attention.key_value.weight")
    heads = model.config.kv_heads
    pairs = zip(attention.key.weight.grad.chunk(heads), attention.value.weight.grad.chunk(heads), strict=True)
    return torch.cat([part for pair in pairs for part in pair])


def test_logits_loss_and_gradients(golden):
    check_logits_loss_and_gradients(*golden, gradients=2)


def test_logits_loss_and_gradients_of_a_mixture(mixture):
    check_logits_loss_and_gradients(*mixture, gradients=3)


def test_a_mixtures_low_rank_norms_take_the_configurations_eps():
    folder = golden_folder("telechat3-moe")
    expected = load_file(folder / "golden.safetensors")
    logits = zili.load(folder)(expected["input_ids"])
    assert (logits - expected["logits_lora_norm_eps_from_config"]).abs().max() <= 1e-4
    assert (logits - expected["logits"]).abs().max() <= 1e-3


def check_logits_loss_and_gradients(model, expected, gradients):
    assert not model.training
    ids = expected["input_ids"]
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert (logits - expected["logits"]).abs().max() <= 1e-4
    # All positions go in: telechat_ntk's tables depend on the length, and the published loss is of the whole.
    labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)), dim=1)
    loss = model.loss_sum(ids, labels) / (labels != IGNORE_INDEX).sum()
    assert (loss - expected["loss"]).abs() <= 1e-5
    loss.backward()
    published = {name.removeprefix("grad."): g for name, g in expected.items() if name.startswith("grad.")}
    assert len(published) == gradients
    for name, gradient in published.items():
        assert (published_gradient(model, name) - gradient).abs().max() <= 1e-4 * gradient.abs().max()


@pytest.mark.parametrize("cached", [False, True])
def test_greedy_ids(golden, cached):
    model, expected = golden
    assert torch.equal(greedy(model, expected["input_ids"], cached=cached), expected["generated_ids"])


@pytest.mark.parametrize("cached", [False, True])
def test_greedy_ids_of_a_mixture(mixture, cached):
    test_greedy_ids(mixture, cached)


def test_the_published_cached_loop_is_the_inexact_cache():
    folder = golden_folder("telechat2-ntk")
    expected = load_file(folder / "golden.safetensors")
    ids = greedy(zili.load(folder), expected["input_ids"], cached=True, exact=False)
    assert torch.equal(ids, expected["generated_ids_cached"])
    assert not torch.equal(ids, expected["generated_ids"])
