"""Mixtures of experts, latent attention and multi-token prediction, against plain loops and formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from zili.config.mixture import LatentConfig, MixtureConfig
from zili.config.model import ModelConfig
from zili.data.loader import Batch
from zili.models.decoder import Decoder
from zili.models.mixture import MixtureOfExperts, Router
from zili.models.outputs import Routing
from zili.objectives import Alone, learner, of_text
from zili.objectives.next_token import NextToken
from zili.ops import IGNORE_INDEX, product, reference

LATENT = LatentConfig(query_rank=20, key_value_rank=12, rope_head_dim=4, value_head_dim=6)
SIGMOID = {"scoring": "sigmoid", "scale": 2.8, "bias": True, "shared_experts": 1}


def config(mixture=None, **changes):
    sizes = {"vocab_size": 72, "hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 8}
    chosen = {"experts": 6, "top_k": 2, "ffn_hidden_size": 10, **(mixture or {})}
    return ModelConfig(
        **{**sizes, "ffn_hidden_size": 24, "mixture": MixtureConfig(**chosen), "init_std": 0.3, **changes}
    )


def layer(mixture=None, seed=0):
    """One mixture whose every number is drawn."""
    torch.manual_seed(seed)
    built = MixtureOfExperts(config(mixture), 0)
    with torch.no_grad():
        for tensor in built.parameters():
            tensor.normal_(0.0, 0.5)
        if built.router.expert_bias is not None:
            built.router.expert_bias.normal_(0.0, 0.3)
    return built


def swiglu(x, gate, up, down):
    gated = gate.double() @ x
    return down.double() @ (gated / (1 + (-gated).exp()) * (up.double() @ x))


def written_out(built, x):
    """A mixture's output, one token and one expert at a time in fp64; also how many tokens met each expert."""
    mixture, router, experts = built.router.mixture, built.router, built.experts
    counts = [0] * mixture.experts
    out = torch.zeros_like(x, dtype=torch.float64)
    bias = [0.0] * mixture.experts if router.expert_bias is None else router.expert_bias.tolist()
    for place in [(b, s) for b in range(x.shape[0]) for s in range(x.shape[1])]:
        token = x[place].double()
        logits = (router.weight.double() @ token).tolist()
        if mixture.scoring == "softmax":
            scores = [math.exp(a) / sum(math.exp(b) for b in logits) for a in logits]
        else:
            scores = [1 / (1 + math.exp(-a)) for a in logits]
        chosen = sorted(range(mixture.experts), key=lambda e: -(scores[e] + bias[e]))[: mixture.top_k]
        total = sum(scores[e] for e in chosen) if mixture.normalize else 1.0
        for e in chosen:
            counts[e] += 1
            weight = mixture.scale * scores[e] / total
            out[place] += weight * swiglu(token, experts.gate[e], experts.up[e], experts.down[e])
        if built.shared is not None:
            out[place] += swiglu(token, built.shared.gate.weight, built.shared.up.weight, built.shared.down.weight)
    return out, counts


@pytest.mark.parametrize(
    "mixture",
    [
        {},
        {"normalize": False, "top_k": 3},
        {"scoring": "sigmoid", "normalize": False},
        SIGMOID,
        {**SIGMOID, "scoring": "softmax", "shared_experts": 2},
        {"top_k": 6},
    ],
    ids=str,
)
@torch.no_grad()
def test_routing_is_the_plain_loop(mixture):
    built, x = layer(mixture), torch.randn(2, 7, 16)
    expected, counts = written_out(built, x)
    torch.testing.assert_close(built(x).double(), expected, atol=1e-5, rtol=1e-5)
    assert noted(built, x).tolist() == counts
    assert sum(counts) == x.shape[0] * x.shape[1] * built.router.mixture.top_k


@torch.no_grad()
def test_a_bias_chooses_and_does_not_weigh():
    built, x = layer({**SIGMOID, "normalize": False, "shared_experts": 0}), torch.randn(1, 5, 16)
    built.router.expert_bias.copy_(torch.tensor([9.0, 0, 0, 9, 0, 0]))
    counts, (routes, _) = noted(built, x), built.router(x, Routing())
    assert counts.tolist() == [5, 0, 0, 5, 0, 0]
    scores = (x @ built.router.weight.T).sigmoid()
    torch.testing.assert_close(routes.weights, 2.8 * scores.gather(-1, routes.experts))


@pytest.mark.parametrize("everyone", [False, True])
def test_an_expert_without_tokens(everyone):
    """All tokens go to the same two of six: nothing is dropped, and the others' gradients are zeros."""
    built, x = layer(SIGMOID), torch.randn(2, 8, 16, requires_grad=True)
    built.router.expert_bias.copy_(torch.tensor([0.0] * 6 if everyone else [0.0, 9, 0, 0, 9, 0]))
    routing = Routing()
    out = built(x, routing)
    torch.testing.assert_close(out.double(), written_out(built, x)[0], atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    ((_, load, _),) = routing.figures
    assert load.sum() == 2 * 8 * 2
    for stack in built.experts.parameters():
        touched = stack.grad.flatten(1).abs().sum(1) > 0
        assert touched.tolist() == (load > 0).tolist()
    assert everyone or load.tolist() == [0, 16, 0, 0, 16, 0]
    assert x.grad.isfinite().all()


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("counts", [[3, 5, 0, 8], [0, 0, 16, 0], [16, 0, 0, 0], [4, 4, 4, 4]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_is_the_reference(counts, dtype):
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    found = []
    for function in (reference.grouped_matmul, product.grouped):
        torch.manual_seed(1)
        x = torch.randn(16, 32).to(dtype).requires_grad_()
        weights = torch.randn(4, 48, 32).to(dtype).requires_grad_()
        out = function(x, weights, ends)
        (out.float() * torch.randn(out.shape)).sum().backward()
        found.append((out, x.grad, weights.grad))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, atol=tolerance, rtol=tolerance / 10)


def noted(built, x, padding=None):
    """Tokens an expert, as the router tells them."""
    routing = Routing(padding)
    with torch.enable_grad():
        built.router(x, routing)
    ((_, tokens, _),) = routing.figures
    return tokens


def loss_of(built, x, padding=None):
    return built.router(x, Routing(padding))[1]


def balance_loss(router, x):
    """DeepSeek-V3, equations 17 to 20, a sequence at a time, each counted by its number of tokens."""
    mixture, total = router.mixture, 0.0
    for sequence in x:
        logits = sequence @ router.weight.T
        scores = logits.softmax(-1) if mixture.scoring == "softmax" else logits.sigmoid()
        wanted = scores if router.expert_bias is None else scores + router.expert_bias
        chosen = wanted.topk(mixture.top_k).indices
        tokens = len(sequence)
        for e in range(mixture.experts):
            fraction = mixture.experts / (mixture.top_k * tokens) * (chosen == e).sum()
            share = (scores[:, e] / scores.sum(-1)).sum() / tokens
            total = total + mixture.balance_loss * fraction * share * tokens
    return total


@pytest.mark.parametrize("mixture", [{}, SIGMOID], ids=["softmax", "sigmoid"])
def test_balance_loss_is_the_formula(mixture):
    built, x = layer({**mixture, "balance_loss": 0.01}), torch.randn(3, 9, 16)
    expected = balance_loss(built.router, x)
    assert expected > 0.01 * 27 * 0.9  # one a token where the load is even
    torch.testing.assert_close(loss_of(built, x), expected)
    # It is added to what is differentiated, whatever the output's gradient.
    (gradient,) = torch.autograd.grad(expected, built.router.weight)
    (built(x) * 0.0).sum().backward()
    torch.testing.assert_close(built.router.weight.grad, gradient)
    with torch.no_grad():
        assert loss_of(built, x) == 0


def test_balance_loss_does_not_depend_on_how_the_batch_is_cut():
    built, x = layer({"balance_loss": 0.01}), torch.randn(4, 6, 16)
    parts = sum(loss_of(built, part) for part in x.split(1))
    torch.testing.assert_close(loss_of(built, x), parts)


PADDED = torch.tensor([9, 5, 1, 0])
"""Tokens of each row of nine positions."""


def padded(mixture):
    """A mixture, rows of which some are filled up, and where."""
    built = layer({"balance_loss": 0.01, **mixture})
    return built, torch.randn(4, 9, 16), torch.arange(9) >= PADDED[:, None]


@pytest.mark.parametrize("mixture", [{}, SIGMOID], ids=["softmax", "sigmoid"])
def test_padding_counts_neither_in_the_load_nor_in_the_balance_loss(mixture):
    built, x, padding = padded(mixture)
    routing = Routing(padding)
    routes, loss = built.router(x, routing)
    ((_, counts, _),) = routing.figures
    rows = [row[None, :length] for row, length in zip(x, PADDED.tolist(), strict=True) if length]
    # A row without its padding, and as much of the loss as its positions are of all.
    expected = sum(balance_loss(built.router, row) * 9 / row.shape[1] for row in rows)
    torch.testing.assert_close(loss, expected)
    assert counts.tolist() == [sum(part) for part in zip(*(written_out(built, row)[1] for row in rows), strict=True)]
    assert routes.counts.sum() == 4 * 9 * built.router.mixture.top_k, "it is routed all the same"


def test_padding_changes_no_token_and_is_noted_nowhere():
    built, x, padding = padded(SIGMOID)
    torch.testing.assert_close(built(x, Routing(padding)), built(x), rtol=0, atol=0)
    assert noted(built, x, padding).sum() == 15 * built.router.mixture.top_k
    torch.testing.assert_close(loss_of(built, x, torch.zeros(4, 9, dtype=torch.bool)), loss_of(built, x))


def test_biases_move_by_the_rate_towards_the_mean_load():
    router = Router(config({**SIGMOID, "bias_update_rate": 0.001}), 0)
    router.expert_bias.copy_(torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5]))
    router.balance(torch.tensor([10.0, 4, 6, 6, 0, 10]))  # mean 6
    moved = router.expert_bias - 0.5
    torch.testing.assert_close(moved, torch.tensor([-1.0, 1, 0, 0, 1, -1]) * 0.001, atol=1e-7, rtol=0)
    fixed = Router(config(SIGMOID), 0)
    fixed.balance(torch.tensor([10.0, 4, 6, 6, 0, 10]))
    assert not fixed.expert_bias.any()


def learned(model, inputs, labels, objective=None):
    """Terms of labels `[B, S]`, or `[B, S, 2]`, and tokens an expert of each layer."""
    objective, routing = objective or of_text(model.config), Routing()
    batch = Batch(inputs, labels, torch.zeros_like(inputs))
    terms = model(inputs, routing=routing, then=lambda outputs: objective.terms(outputs, batch, Alone()))
    return terms, {figures.layer: figures.tokens.tolist() for figures in routing.figures}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_tokens_are_counted_once_and_in_training_only(recompute):
    decoder = learner(config({**SIGMOID, "balance_loss": 0.01}, mtp_layers=1))
    ids = torch.randint(72, (2, 9))
    labels = torch.stack((ids[:, 1:-1], ids[:, 2:]), -1)
    decoder.recompute = recompute
    terms, loads = learned(decoder, ids[:, :-2], labels)
    assert [sum(load) for load in loads.values()] == [2 * 7 * 2] * 3  # two layers, and multi-token prediction's
    terms.loss.backward()
    gradients = [parameter.grad.clone() for parameter in decoder.parameters()]
    with torch.no_grad():
        assert learned(decoder, ids, ids, NextToken())[1] == {}
    plain = learner(decoder.config)
    terms, same = learned(plain, ids[:, :-2], labels)
    terms.loss.backward()
    assert same == loads
    for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("mixture", [None, {**SIGMOID, "dense_layers": 1}], ids=["softmax", "sigmoid"])
@torch.no_grad()
def test_latent_attention_with_a_cache_is_the_full_pass(mixture):
    model = Decoder(config(mixture, latent=LATENT)).eval()
    ids = torch.randint(72, (2, 12), generator=torch.Generator().manual_seed(3))
    full = model(ids)
    cache = model.new_cache(2, 12)
    steps = [model(part, cache=cache) for part in ids.split([5, 1, 3, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5 * full.abs().max().item(), rtol=0)


@torch.no_grad()
def test_latent_attention_is_its_formula():
    """DeepSeek-V2, equations 37 to 47, one head and one position at a time in fp64."""
    model = Decoder(config(latent=LATENT)).eval()
    attention, x = model.layers[0].attention, torch.randn(1, 6, 16)
    t = {name: tensor.double() for name, tensor in attention.named_parameters()}
    plain, turned, value_dim = 8 - 4, 4, 6
    frequency = 1 / 10_000 ** (torch.arange(0, turned, 2).double() / turned)

    def norm(vector, weight):
        return vector / (vector.square().mean() + 1e-5).sqrt() * weight

    def turn(vector, position):
        pairs = torch.complex(vector[: turned // 2], vector[turned // 2 :])
        pairs = pairs * torch.polar(torch.ones_like(frequency), position * frequency)
        return torch.cat((pairs.real, pairs.imag))

    tokens = x[0].double()
    out = torch.zeros(6, 4 * value_dim).double()
    for now in range(6):
        query = t["query_up.weight"] @ norm(t["query_down.weight"] @ tokens[now], t["query_norm.weight"])
        for head in range(4):
            q = query[head * 8 : head * 8 + 8]
            q = torch.cat((q[:plain], turn(q[plain:], now)))
            scores, values = [], []
            for then in range(now + 1):
                down = t["key_value_down.weight"] @ tokens[then]
                up = t["key_value_up.weight"] @ norm(down[:12], t["key_value_norm.weight"])
                own = up[head * (plain + value_dim) : (head + 1) * (plain + value_dim)]
                scores.append(q @ torch.cat((own[:plain], turn(down[12:], then))) / 8**0.5)
                values.append(own[plain:])
            weights = torch.stack(scores).softmax(0)
            out[now, head * value_dim : (head + 1) * value_dim] = weights @ torch.stack(values)
    expected = out @ t["output.weight"].T

    from zili.models.rotary import rotary_tables

    cos, sin = rotary_tables(model.config.rotary, turned, torch.arange(6), 6)
    torch.testing.assert_close(attention(x, cos, sin)[0].double(), expected, atol=1e-5, rtol=0)


def test_multi_token_prediction_is_its_formula():
    """DeepSeek-V3, equations 21 to 25: in the gradient by its weight, and not in the loss that is returned."""
    model = learner(config(mtp_layers=1, mtp_loss_weight=0.3, latent=LATENT, embedding_multiplier=2.0))
    ids = torch.randint(72, (2, 10), generator=torch.Generator().manual_seed(5))
    inputs, following, further = ids[:, :-2], ids[:, 1:-1], ids[:, 2:].clone()
    further[0, 3] = IGNORE_INDEX
    terms, _ = learned(model, inputs, torch.stack((following, further), -1))

    hidden = model.hidden_states(inputs)
    main = F.cross_entropy(model.logits(hidden).flatten(0, 1), following.flatten(), reduction="sum")
    part = model.next_tokens
    embedded = model.embedding.weight[following] * 2.0
    joined = torch.cat((rms(embedded, part.embedding_norm), rms(hidden, part.hidden_norm)), -1)

    from zili.models.rotary import rotary_tables

    tables = rotary_tables(model.config.rotary, LATENT.rope_head_dim, torch.arange(8), 8)
    block = rms(part.block(joined @ part.projection.weight.T, *tables), part.norm)
    logits = (block @ model.head.weight.T).flatten(0, 1)
    second = F.cross_entropy(logits, further.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(terms.loss, main)
    torch.testing.assert_close(terms.figures["next_loss"], second.detach())
    parameters = list(model.parameters())
    expected = torch.autograd.grad(main + 0.3 * second, parameters)
    for value, gradient in zip(torch.autograd.grad(terms.loss, parameters), expected, strict=True):
        torch.testing.assert_close(value, gradient, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(learned(model, inputs, following, NextToken())[0].loss, main.detach())


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def test_the_balance_loss_counts_by_the_share_of_labels_that_count():
    """Twice as many labels, each with half of it: the quotient that the trainer makes is the same."""
    config = ModelConfig(
        vocab_size=8,
        hidden_size=16,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=8,
        ffn_hidden_size=16,
        mixture=MixtureConfig(experts=4, top_k=2, ffn_hidden_size=8, balance_loss=0.5),
    )
    router = Router(config, 0)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 6, 16)
    whole = router(x, Routing())[1]
    assert torch.allclose(router(x, Routing(weight=0.25))[1], whole / 4)
