"""The Llama layout: Llama itself, and under names of their own TeleChat3-36B and Tele-FLM with its two muP keys.

Sources: transformers modeling_llama.py and modeling_rope_utils.py; wenet-e2e/west configuration_telechat3.py;
vLLM teleflm.py.
"""

from __future__ import annotations

import math
import re
from typing import Any

from zili.config.model import ModelConfig, RotaryConfig
from zili.release.layouts.layout import PublishedConfig, PublishedLayout
from zili.release.layouts.mapping import Rule, same
from zili.release.layouts.mup import PUBLISHED_LENGTH, read_mup, write_mup

_ROTARY_RULES = {
    "default": "plain",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
    "telechat3-yarn": "telechat3_yarn",
}
_PARTS = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}


class Llama(PublishedLayout):
    name = "llama"
    prefix = "model."
    embedding = "embed_tokens.weight"
    ignored = re.compile(r"(^|\.)rotary_emb\.")
    # Other families (Gemma, Qwen3) use the same keys and names for other maths, so the type must be one of these.
    model_types: tuple[str, ...] = ("llama",)
    architecture = "LlamaForCausalLM"
    rotary_rules: tuple[str, ...] = ("plain", "linear", "llama3", "yarn")
    multipliers = False
    """Whether it has muP's."""

    def recognises(self, config: PublishedConfig, names: set[str]) -> bool:
        return (
            str(config.get("model_type")).lower() in self.model_types
            and (self.multipliers or not config.get("use_mup", False))
            and "num_hidden_layers" in config.values
            and any(name.endswith("self_attn.q_proj.weight") for name in names)
        )

    def read_config(self, config: PublishedConfig, names: set[str]) -> ModelConfig:
        hidden, heads = config.need("hidden_size"), config.need("num_attention_heads")
        config.only("hidden_act", "silu")
        # TeleChat3-1.8B factorises its embedding and shares layers in groups; the 36B class has the keys,
        # unused.
        config.only("embedding_size", hidden)
        config.only("num_hidden_layer_groups", config.need("num_hidden_layers"))
        attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
        return config.model(
            {
                "vocab_size": config.need("vocab_size"),
                "hidden_size": hidden,
                "layers": config.need("num_hidden_layers"),
                "heads": heads,
                "kv_heads": config.get("num_key_value_heads", heads),
                "head_dim": config.get("head_dim", hidden // heads),
                "ffn_hidden_size": config.need("intermediate_size"),
                "max_length": config.need("max_position_embeddings"),
                "norm_eps": config.need("rms_norm_eps"),
                "tied_embeddings": config.get("tie_word_embeddings", False),
                "qkv_bias": attention_bias,
                "attention_output_bias": attention_bias,
                "gate_up_bias": mlp_bias,
                "ffn_down_bias": mlp_bias,
                "attention_dropout": config.get("attention_dropout", 0.0),
                "init_std": config.get("initializer_range", 0.02),
                **read_mup(config),
                "rotary": _read_rotary(config),
            }
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.model_types[0],
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.ffn_hidden_size,
            "max_position_embeddings": config.max_length,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied_embeddings,
            "attention_bias": config.attention_output_bias,
            "mlp_bias": config.ffn_down_bias,
            "attention_dropout": config.attention_dropout,
            "initializer_range": config.init_std,
            "hidden_act": "silu",
            "rope_theta": config.rotary.base,
            "rope_scaling": _write_scaling(config.rotary),
            "use_cache": True,
        }

    def unsupported(self, config: ModelConfig) -> list[str]:
        if config.rotary.rule not in self.rotary_rules:
            return [f"it has no name for rotary.rule = {config.rotary.rule!r}"]
        return super().unsupported(config)

    def body(self, config: ModelConfig, prefix: str) -> list[Rule]:
        rules = [same(f"{prefix}embed_tokens.weight", "embedding.weight")]
        biased = {
            "attention": config.qkv_bias and config.attention_output_bias,
            "feed_forward": config.gate_up_bias and config.ffn_down_bias,
        }
        for i in range(config.layers):
            theirs, ours = f"{prefix}layers.{i}", f"layers.{i}"
            rules.append(same(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight"))
            rules.append(same(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight"))
            for published, parameter in _PARTS.items():
                kinds = ("weight", "bias") if biased[parameter.split(".")[0]] else ("weight",)
                rules += [same(f"{theirs}.{published}.{kind}", f"{ours}.{parameter}.{kind}") for kind in kinds]
        return [*rules, same(f"{prefix}norm.weight", "norm.weight")]


class TeleChat3(Llama):
    """TeleChat3-36B: Llama under another name, with its own kind of YaRN."""

    name = "telechat3"
    model_types = ("telechat3",)
    architecture = "TeleChat3ForCausalLM"
    rotary_rules = ("plain", "linear", "llama3", "yarn", "telechat3_yarn")

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        code = {
            "AutoConfig": "configuration_telechat3.TeleChat3Config",
            "AutoModelForCausalLM": "modeling_telechat3.TeleChat3ForCausalLM",
        }
        return {**super().write_config(config), "auto_map": code}


class TeleFLM(Llama):
    """Tele-FLM: Llama with muP's multipliers, and a rotary base that follows the length."""

    name = "teleflm"
    model_types = ("teleflm", "tele-flm", "tele_flm", "llama")
    architecture = "TeleFLMForCausalLM"
    rotary_rules = ("plain", "linear", "llama3", "yarn", "tele_flm_ntk")
    multipliers = True

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        written = super().write_config(config)
        plain = config.rotary.rule != "tele_flm_ntk" and config.embedding_multiplier == config.logit_multiplier == 1.0
        return written if plain else {**written, **write_mup(config)}


def _read_rotary(config: PublishedConfig) -> dict[str, Any]:
    """Either spelling: `rope_theta` beside `rope_scaling`, or transformers 5's `rope_parameters` alone."""
    table = {**config.get("rope_scaling", {}), **config.get("rope_parameters", {})}
    rope = PublishedConfig(config.path, table)
    kind = rope.get("rope_type", rope.get("type", "default"))
    PublishedConfig(config.path, {"rope_type": kind}).only("rope_type", *_ROTARY_RULES)
    rope.only("truncate", True)
    rope.only("partial_rotary_factor", 1.0)
    rotary: dict[str, Any] = {
        "rule": _ROTARY_RULES[kind],
        "base": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
    }
    if kind == "default":
        flm = {"rule": "tele_flm_ntk", "original_length": PUBLISHED_LENGTH}
        return {**rotary, **flm} if config.get("use_mup", False) else rotary
    if kind == "linear":
        return {**rotary, "factor": rope.need("factor")}
    original = rope.get("original_max_position_embeddings", config.need("max_position_embeddings"))
    rotary |= {"factor": rope.get("factor", config.need("max_position_embeddings") / original)}
    rotary |= {"original_length": original}
    if kind == "llama3":
        low, high = rope.need("low_freq_factor"), rope.need("high_freq_factor")
        return {**rotary, "low_frequency_factor": low, "high_frequency_factor": high}
    slope = 0.1 if kind == "yarn" else 0.07
    return {
        **rotary,
        "beta_fast": rope.get("beta_fast", 32.0),
        "beta_slow": rope.get("beta_slow", 1.0),
        "attention_factor": _attention_factor(rope, rotary["factor"], slope),
    }


def _attention_factor(rope: PublishedConfig, factor: float, slope: float) -> float | None:
    """An explicit factor, the ratio of two mscales, or None for the rule's own."""
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("attention_factor") is not None or not (above and below):
        return rope.get("attention_factor")
    return (slope * above * math.log(factor) + 1.0) / (slope * below * math.log(factor) + 1.0)


def _write_scaling(rotary: RotaryConfig) -> dict[str, Any] | None:
    """`rope_scaling`, the spelling that every transformers and vLLM reads."""
    if rotary.rule in ("plain", "tele_flm_ntk", "telechat_ntk"):
        return None
    kind = next(published for published, rule in _ROTARY_RULES.items() if rule == rotary.rule)
    scaling: dict[str, Any] = {"rope_type": kind, "factor": rotary.factor}
    if rotary.rule != "linear":
        scaling["original_max_position_embeddings"] = rotary.original_length
    if rotary.rule == "llama3":
        scaling["low_freq_factor"] = rotary.low_frequency_factor
        scaling["high_freq_factor"] = rotary.high_frequency_factor
    elif rotary.rule != "linear":
        scaling |= {"beta_fast": rotary.beta_fast, "beta_slow": rotary.beta_slow}
        if rotary.attention_factor is not None:
            scaling["attention_factor"] = rotary.attention_factor
    return scaling
