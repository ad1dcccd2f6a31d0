"""The layout of DeepSeek-V3, in which TeleChat3-105B-A4.7B is published: latent attention and experts.

Sources: transformers modeling_deepseek_v3.py; the DeepSeek-V3 release's README_WEIGHTS.md for the layer of multi-token
prediction; ms-swift, which gives TeleChat3-105B-A4.7B the type deepseek_v3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from zili.config.mixture import MixtureConfig
from zili.config.model import ModelConfig
from zili.errors import CheckpointError
from zili.release.layouts.layout import PublishedConfig, PublishedLayout, Variant
from zili.release.layouts.mapping import Rule, paired_rows, same, stacked

# DeepSeek-V2 has the same names for another order of normalising and scaling the experts' weights.
_MODEL_TYPES = ("deepseek_v3", "telechat3")
_ATTENTION = {
    "q_a_proj": "query_down",
    "q_a_layernorm": "query_norm",
    "q_b_proj": "query_up",
    "kv_a_proj_with_mqa": "key_value_down",
    "kv_a_layernorm": "key_value_norm",
    "kv_b_proj": "key_value_up",
    "o_proj": "output",
}
_BIASED = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
"""What attention_bias gives a bias to."""
_NEXT_TOKENS = {
    "enorm": "embedding_norm",
    "hnorm": "hidden_norm",
    "eh_proj": "projection",
    "shared_head.norm": "norm",
}


class DeepSeek(PublishedLayout):
    name = "deepseek"
    prefix = "model."
    embedding = "embed_tokens.weight"
    mixtures = True
    # The layer of multi-token prediction repeats the model's embedding and head; `repeats` checks that it does. They
    # are not written: they are no weights of their own, and a reader of that layer has the model's beside it.
    ignored = re.compile(r"(^|\.)rotary_emb\.|(^|\.)layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")

    def recognises(self, config: PublishedConfig, names: set[str]) -> bool:
        return str(config.get("model_type")).lower() in _MODEL_TYPES and any(
            name.endswith("self_attn.kv_a_proj_with_mqa.weight") for name in names
        )

    def read_config(self, config: PublishedConfig, names: set[str]) -> ModelConfig:
        config.only("hidden_act", "silu")
        heads, rope = config.need("num_attention_heads"), config.need("qk_rope_head_dim")
        attention_bias = config.get("attention_bias", False)
        return config.model(
            {
                "vocab_size": config.need("vocab_size"),
                "hidden_size": config.need("hidden_size"),
                "layers": config.need("num_hidden_layers"),
                "heads": heads,
                "kv_heads": heads,
                "head_dim": config.need("qk_nope_head_dim") + rope,
                "ffn_hidden_size": config.need("intermediate_size"),
                "max_length": config.need("max_position_embeddings"),
                "norm_eps": config.need("rms_norm_eps"),
                "tied_embeddings": config.get("tie_word_embeddings", False),
                "qkv_bias": attention_bias,
                "attention_output_bias": attention_bias,
                "attention_dropout": config.get("attention_dropout", 0.0),
                "init_std": config.get("initializer_range", 0.02),
                "mtp_layers": _read_next_tokens(config, names),
                "rotary": {"base": _read_base(config)},
                "mixture": _read_mixture(config, names),
                "latent": {
                    "query_rank": _need_query_rank(config),
                    "key_value_rank": config.need("kv_lora_rank"),
                    "rope_head_dim": rope,
                    "value_head_dim": config.need("v_head_dim"),
                },
            }
        )

    def unsupported(self, config: ModelConfig) -> list[str]:
        for part in ("latent", "mixture"):
            if getattr(config, part) is None:
                return [f"it has no {part} part, which this layout is made of"]
        return super().unsupported(config)

    def repeats(self, config: ModelConfig, variant: Variant, names: set[str]) -> dict[str, str]:
        layer, embedding = f"{variant.prefix}layers.{config.layers}", variant.prefix + self.embedding
        copies = {
            f"{layer}.embed_tokens.weight": embedding,
            f"{layer}.shared_head.head.weight": embedding if config.tied_embeddings else "lm_head.weight",
        }
        copies = {name: other for name, other in copies.items() if name in names}
        return {**super().repeats(config, variant, names), **copies}

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        latent, mixture = config.latent, config.mixture
        assert latent is not None and mixture is not None, "unsupported() has refused it"
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "qk_nope_head_dim": config.head_dim - latent.rope_head_dim,
            "qk_rope_head_dim": latent.rope_head_dim,
            "v_head_dim": latent.value_head_dim,
            "q_lora_rank": latent.query_rank,
            "kv_lora_rank": latent.key_value_rank,
            "intermediate_size": config.ffn_hidden_size,
            "max_position_embeddings": config.max_length,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied_embeddings,
            "attention_bias": config.attention_output_bias,
            "attention_dropout": config.attention_dropout,
            "initializer_range": config.init_std,
            "num_nextn_predict_layers": config.mtp_layers,
            "hidden_act": "silu",
            "rope_theta": config.rotary.base,
            "rope_scaling": None,
            "use_cache": True,
            **_write_mixture(mixture),
        }

    def body(self, config: ModelConfig, prefix: str) -> list[Rule]:
        rules = [same(f"{prefix}embed_tokens.weight", "embedding.weight")]
        for i in range(config.layers):
            rules += _block(config, i, f"{prefix}layers.{i}", f"layers.{i}")
        rules.append(same(f"{prefix}norm.weight", "norm.weight"))
        if config.mtp_layers:
            theirs = f"{prefix}layers.{config.layers}"
            for published, parameter in _NEXT_TOKENS.items():
                rules.append(same(f"{theirs}.{published}.weight", f"next_tokens.{parameter}.weight"))
            rules += _block(config, config.layers, theirs, "next_tokens.block")
        return rules


def _block(config: ModelConfig, number: int, theirs: str, ours: str) -> Iterator[Rule]:
    yield same(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
    yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight")
    for published, parameter in _ATTENTION.items():
        kinds = ("weight", "bias") if config.qkv_bias and published in _BIASED else ("weight",)
        for kind in kinds:
            yield _attention_rule(
                config, published, f"{theirs}.self_attn.{published}.{kind}", f"{ours}.attention.{parameter}.{kind}"
            )
    mlp, feed_forward = f"{theirs}.mlp", f"{ours}.feed_forward"
    if not config.has_experts(number):
        yield from _swiglu(mlp, feed_forward)
        return
    mixture = config.mixture
    assert mixture is not None
    yield same(f"{mlp}.gate.weight", f"{feed_forward}.router.weight")
    if mixture.bias:
        yield same(f"{mlp}.gate.e_score_correction_bias", f"{feed_forward}.router.expert_bias")
    for part in ("gate", "up", "down"):
        name = f"{mlp}.experts.{{expert}}.{part}_proj.weight"
        yield from stacked(name, f"{feed_forward}.experts.{part}", mixture.experts)
    if mixture.shared_experts:
        yield from _swiglu(f"{mlp}.shared_experts", f"{feed_forward}.shared")


def _attention_rule(config: ModelConfig, part: str, published: str, parameter: str) -> Rule:
    latent = config.latent
    assert latent is not None
    if part == "q_b_proj":
        return paired_rows(published, parameter, config.head_dim - latent.rope_head_dim, latent.rope_head_dim)
    if part == "kv_a_proj_with_mqa":
        return paired_rows(published, parameter, latent.key_value_rank, latent.rope_head_dim)
    return same(published, parameter)


def _swiglu(theirs: str, ours: str) -> list[Rule]:
    return [same(f"{theirs}.{part}_proj.weight", f"{ours}.{part}.weight") for part in ("gate", "up", "down")]


def _read_mixture(config: PublishedConfig, names: set[str]) -> dict[str, Any]:
    config.only("moe_layer_freq", 1)
    config.only("n_group", 0, 1)
    config.only("topk_group", 0, 1)
    config.only("topk_method", "noaux_tc", "greedy")
    config.only("scoring_func", "sigmoid", "softmax")
    return {
        "experts": config.need("n_routed_experts"),
        "top_k": config.need("num_experts_per_tok"),
        "ffn_hidden_size": config.need("moe_intermediate_size"),
        "shared_experts": config.get("n_shared_experts", 0),
        "dense_layers": config.get("first_k_dense_replace", 0),
        "scoring": config.get("scoring_func", "sigmoid"),  # transformers' class has no such key: always sigmoid
        "normalize": config.get("norm_topk_prob", True),
        "scale": config.get("routed_scaling_factor", 1.0),
        "bias": any(name.endswith("mlp.gate.e_score_correction_bias") for name in names),
        "balance_loss": config.get("aux_loss_alpha", 0.0),
    }


def _write_mixture(mixture: MixtureConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "moe_intermediate_size": mixture.ffn_hidden_size,
        "n_shared_experts": mixture.shared_experts or None,
        "first_k_dense_replace": mixture.dense_layers,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc" if mixture.bias else "greedy",
        "scoring_func": mixture.scoring,
        "norm_topk_prob": mixture.normalize,
        "routed_scaling_factor": mixture.scale,
        "seq_aux": True,
        "aux_loss_alpha": mixture.balance_loss,
    }


def _read_base(config: PublishedConfig) -> float:
    """rope_theta, in either spelling; a scaling that changes nothing passes."""
    for key in ("rope_scaling", "rope_parameters"):
        table = config.get(key) or {}
        plain = table.get("rope_type", table.get("type", "default")) == "default"
        if not plain and table.get("factor", 1.0) != 1.0:
            config.only(key, None)
    table = config.get("rope_parameters") or {}
    base: float = table.get("rope_theta", config.get("rope_theta", 10_000.0))
    return base


def _read_next_tokens(config: PublishedConfig, names: set[str]) -> int:
    config.only("num_nextn_predict_layers", 0, 1)
    # Loading and saving with transformers drops that layer and keeps the key.
    layer = f"layers.{config.need('num_hidden_layers')}."
    stored = any(name.removeprefix(DeepSeek.prefix).startswith(layer) for name in names)
    return int(stored and config.get("num_nextn_predict_layers", 0))


def _need_query_rank(config: PublishedConfig) -> int:
    rank = config.get("q_lora_rank")
    if rank is None:
        raise CheckpointError(
            f"{config.path}: q_lora_rank is null, so queries come from the hidden state itself; this version "
            "reads latent queries only"
        )
    return int(rank)
