"""The decoder against transformers' Llama, against itself without a cache, and its promises about weights."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from zili import ops
from zili.config.model import ModelConfig, RotaryConfig
from zili.models.decoder import Decoder
from zili.models.initialization import initial_value

RULES = {
    "plain": RotaryConfig(),
    "linear": RotaryConfig(rule="linear", factor=2.0),
    "llama3": RotaryConfig(rule="llama3", factor=8.0, original_length=16),
    "yarn": RotaryConfig(rule="yarn", factor=4.0, original_length=16),
    "telechat3_yarn": RotaryConfig(rule="telechat3_yarn", factor=4.0, original_length=16),
    "telechat_ntk": RotaryConfig(rule="telechat_ntk", original_length=8, training_length=8),
    "tele_flm_ntk": RotaryConfig(rule="tele_flm_ntk", original_length=8),
}


def tiny(**changes):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn_hidden_size": 48,
    }
    # A wide init, so that attention and logits are far from uniform and a wrong table shows.
    return ModelConfig(**{**sizes, "init_std": 0.3, **changes})


def ids_like(config, batch=2, length=24, seed=0):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


LLAMAS = {
    "plain": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
    "attention_bias": ({"attention_bias": True}, {"qkv_bias": True, "attention_output_bias": True}),
    "mlp_bias": ({"mlp_bias": True}, {"gate_up_bias": True, "ffn_down_bias": True}),
    "wide_heads": ({"head_dim": 12}, {"head_dim": 12}),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rotary": RULES["linear"]},
    ),
    "llama3": (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"rotary": RULES["llama3"]},
    ),
    "yarn": (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"rotary": RULES["yarn"]},
    ),
}
NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


def llama_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("layers."):
        _, number, part = stem.split(".", 2)
        return f"model.layers.{number}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


@pytest.mark.parametrize("case", LLAMAS)
def test_logits_loss_and_gradients_are_transformers_llamas(case):
    theirs, ours = LLAMAS[case]
    config = tiny(norm_eps=1e-6, **ours)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            attn_implementation="eager",
            **theirs,
        )
    )
    decoder = Decoder(config)
    theirs = dict(llama.named_parameters())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("bias"):
                theirs[llama_name(name)].normal_()
            else:
                theirs[llama_name(name)].copy_(parameter)
            parameter.copy_(theirs[llama_name(name)])
    ids = ids_like(config)
    expected = llama(ids, labels=ids)
    torch.testing.assert_close(decoder(ids), expected.logits, atol=1e-4, rtol=0)
    labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], ops.IGNORE_INDEX)), dim=1)
    loss = decoder.loss_sum(ids, labels) / (labels != ops.IGNORE_INDEX).sum()
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    loss.backward()
    expected.loss.backward()
    for name, parameter in decoder.named_parameters():
        reference = theirs[llama_name(name)].grad
        assert (parameter.grad - reference).abs().max() <= 1e-4 * reference.abs().max(), name


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_cached_decoding_equals_the_full_forward(rule):
    # 24 tokens over an original length of 8 cross two doublings; telechat_ntk's magnitude moves every token.
    decoder = Decoder(tiny(rotary=RULES[rule])).eval()
    ids = ids_like(decoder.config)
    cache = decoder.new_cache(2, 24)
    start = 0
    for chunk in (5, 1, 1, 1, 1, 4, 1, 1, 1, 1, 1, 6):
        end = start + chunk
        logits = decoder(ids[:, start:end], cache=cache)
        torch.testing.assert_close(logits, decoder(ids[:, :end])[:, start:], atol=1e-4, rtol=0)
        assert cache.length == end
        start = end


@torch.no_grad()
def test_an_inexact_cache_leaves_old_keys_as_they_were():
    decoder = Decoder(tiny(rotary=RULES["telechat_ntk"])).eval()
    ids = ids_like(decoder.config)
    cache = decoder.new_cache(2, 24, exact=False)
    decoder(ids[:, :8], cache=cache)
    first = cache.keys[..., :8, :].clone()
    logits = [decoder(ids[:, i : i + 1], cache=cache) for i in range(8, 24)]
    assert torch.equal(cache.keys[..., :8, :], first)
    assert (logits[-1] - decoder(ids)[:, -1:]).abs().max() > 1e-2


@torch.no_grad()
def test_a_truncated_cache_continues_differently():
    decoder = Decoder(tiny(rotary=RULES["telechat_ntk"])).eval()
    first, second = ids_like(decoder.config), ids_like(decoder.config, seed=1)
    cache = decoder.new_cache(2, 24)
    decoder(first, cache=cache)
    cache.truncate(6)
    both = torch.cat((first[:, :6], second[:, 6:9]), dim=1)
    logits = decoder(second[:, 6:9], cache=cache)
    torch.testing.assert_close(logits, decoder(both)[:, 6:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_full_cache_says_so():
    decoder = Decoder(tiny())
    cache = decoder.new_cache(2, 8)
    with pytest.raises(ValueError, match="room for 8 tokens, 9 are needed"):
        decoder(ids_like(decoder.config, length=9), cache=cache)
    with pytest.raises(ValueError, match="2 rows, input_ids has 3"):
        decoder(ids_like(decoder.config, batch=3, length=4), cache=cache)


@torch.no_grad()
def test_documents_do_not_see_each_other():
    decoder = Decoder(tiny()).eval()
    ids = ids_like(decoder.config)
    documents = torch.tensor([[0] * 10 + [1] * 14, [5] * 3 + [6] * 21])
    packed = decoder(ids, document_ids=documents)
    for row, cut in ((0, 10), (1, 3)):
        # Rotary positions are relative, so a document further on in the row is the same document.
        for part in (slice(0, cut), slice(cut, 24)):
            alone = decoder(ids[row : row + 1, part])
            torch.testing.assert_close(packed[row : row + 1, part], alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_document_ids_reach_cached_tokens():
    decoder = Decoder(tiny(rotary=RULES["tele_flm_ntk"])).eval()
    ids = ids_like(decoder.config)
    documents = torch.tensor([[0] * 10 + [1] * 14, [0] * 3 + [1] * 21])
    cache = decoder.new_cache(2, 24)
    pieces = [decoder(ids[:, a:b], document_ids=documents[:, :b], cache=cache) for a, b in ((0, 7), (7, 15), (15, 24))]
    expected = [decoder(ids[:, :b], document_ids=documents[:, :b])[:, a:] for a, b in ((0, 7), (7, 15), (15, 24))]
    for piece, full in zip(pieces, expected, strict=True):
        torch.testing.assert_close(piece, full, atol=1e-4, rtol=0)


def test_loss_sum_ignores_and_adds():
    decoder = Decoder(tiny(logit_multiplier=0.25, embedding_multiplier=3.0))
    ids = ids_like(decoder.config)
    labels = ids.roll(-1, dims=1)
    labels[:, -3:] = ops.IGNORE_INDEX
    expected = cross_entropy(decoder(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    loss = decoder.loss_sum(ids, labels)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_mup_multiplies_embeddings_and_logits():
    plain = Decoder(tiny(tied_embeddings=False))
    scaled = Decoder(tiny(embedding_multiplier=2.0, logit_multiplier=1 / 32))
    with torch.no_grad():
        plain.embedding.weight.mul_(2.0)
    ids = ids_like(plain.config)
    torch.testing.assert_close(scaled(ids), plain(ids) / 32)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_changes_no_gradient(dropout):
    config = tiny(hidden_dropout=dropout, attention_dropout=dropout)
    gradients = []
    for recompute in ("none", "full"):
        decoder = Decoder(config)
        decoder.recompute = recompute
        torch.manual_seed(3)
        decoder.loss_sum(ids_like(config), ids_like(config)).backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_dropout_acts_in_training_only():
    decoder = Decoder(tiny(hidden_dropout=0.1, attention_dropout=0.1))
    ids = ids_like(decoder.config)
    assert not torch.equal(decoder(ids), decoder(ids))
    decoder.eval()
    assert torch.equal(decoder(ids), decoder(ids))
    assert torch.equal(decoder(ids), Decoder(tiny())(ids))


def test_a_block_is_one_graph():
    decoder = Decoder(tiny())
    ids = ids_like(decoder.config)
    expected = decoder(ids)
    for block in decoder.layers:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(decoder(ids), expected)
    documents = torch.zeros_like(ids)
    torch.testing.assert_close(decoder(ids, document_ids=documents), expected)


def test_the_operations_are_looked_up_at_call_time(monkeypatch):
    called = []
    for name in ("linear", "rms_norm", "add_rms_norm", "rotate", "swiglu", "attention", "linear_cross_entropy"):
        original = getattr(ops, name)

        def recorded(*args, name=name, original=original, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, recorded)
    decoder = Decoder(tiny())
    decoder.loss_sum(ids_like(decoder.config), ids_like(decoder.config))
    counts = {name: called.count(name) for name in set(called)}
    assert counts == {
        "linear": 21,
        "rms_norm": 4,
        "add_rms_norm": 3,
        "rotate": 6,
        "swiglu": 3,
        "attention": 3,
        "linear_cross_entropy": 1,
    }


def test_weights_are_a_function_of_seed_and_name():
    config = tiny()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Decoder(config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    with torch.device("meta"):
        second = Decoder(config)
    second.to_empty(device="cpu").init_weights(0)
    deeper = Decoder(tiny(layers=5))  # other layers, yet the same first embedding
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        assert torch.equal(value, initial_value(name, tuple(value.shape), config, 0))
    assert torch.equal(first.embedding.weight, deeper.embedding.weight)
    second.init_weights(1)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)
    assert not torch.equal(first.layers[0].attention.key.weight, first.layers[1].attention.key.weight)


def test_initial_spread():
    config = ModelConfig(
        vocab_size=512,
        hidden_size=128,
        layers=8,
        heads=4,
        kv_heads=4,
        head_dim=32,
        ffn_hidden_size=256,
        init_std=0.01,
        attention_output_bias=True,
        ffn_down_bias=True,
    )
    decoder = Decoder(config)
    block = decoder.layers[3]
    for matrix, std in (
        (decoder.embedding.weight, 0.01),
        (decoder.head_weight, 0.01),
        (block.attention.query.weight, 0.01),
        (block.feed_forward.gate.weight, 0.01),
        (block.attention.output.weight, 0.01 / 4),
        (block.feed_forward.down.weight, 0.01 / 4),
    ):
        assert matrix.std().item() == pytest.approx(std, rel=0.03)
    assert torch.equal(block.attention_norm.weight, torch.ones(128))
    assert not block.attention.output.bias.any() and not block.feed_forward.down.bias.any()


def test_bfloat16_forward_gives_float32_logits():
    decoder = Decoder(tiny(rotary=RULES["telechat_ntk"])).to(torch.bfloat16).eval()
    logits = decoder(ids_like(decoder.config))
    assert logits.dtype == torch.float32
    assert decoder.new_cache(1, 4).keys.dtype == torch.bfloat16
