"""The Llama architecture as llama.cpp has it: names of tensors and of metadata in a GGUF file.

Source: the `gguf` package's constants.py (names); ggml-org/llama.cpp's converter for Llama (rows of query and key put
so that neighbours are turned together).
"""

from __future__ import annotations

import math
import re
from typing import Any

from zili.config.model import ModelConfig
from zili.errors import CheckpointError
from zili.release.layouts.layout import PublishedConfig, PublishedLayout, Variant
from zili.release.layouts.mapping import Rule, paired_rows, same

_PARTS = {
    "attn_q": "attention.query",
    "attn_k": "attention.key",
    "attn_v": "attention.value",
    "attn_output": "attention.output",
    "ffn_gate": "feed_forward.gate",
    "ffn_up": "feed_forward.up",
    "ffn_down": "feed_forward.down",
}
_TURNED = ("attn_q", "attn_k")


class GGUF(PublishedLayout):
    name = "gguf"
    prefix = ""
    embedding = "token_embd.weight"
    ignored = re.compile(r"^$")

    def recognises(self, config: PublishedConfig, names: set[str]) -> bool:
        return "general.architecture" in config.values

    def read_config(self, config: PublishedConfig, names: set[str]) -> ModelConfig:
        config.must_be("general.architecture", "llama")
        config.only("llama.expert_count", 0)
        if "rope_freqs.weight" in names:
            raise CheckpointError(
                f"{config.path}: its positions are scaled by a table (rope_freqs.weight), which is not read; import "
                "the model's Hugging Face folder instead"
            )
        heads, hidden = config.need("llama.attention.head_count"), config.need("llama.embedding_length")
        head_dim = config.get("llama.attention.key_length", hidden // heads)
        config.only("llama.attention.value_length", head_dim)
        config.only("llama.rope.dimension_count", head_dim)
        attention = "blk.0.attn_q.bias" in names
        feed_forward = "blk.0.ffn_gate.bias" in names
        return config.model(
            {
                "vocab_size": config.need("llama.vocab_size"),
                "hidden_size": hidden,
                "layers": config.need("llama.block_count"),
                "heads": heads,
                "kv_heads": config.get("llama.attention.head_count_kv", heads),
                "head_dim": head_dim,
                "ffn_hidden_size": config.need("llama.feed_forward_length"),
                "max_length": config.need("llama.context_length"),
                "norm_eps": config.need("llama.attention.layer_norm_rms_epsilon"),
                "tied_embeddings": "output.weight" not in names,
                "qkv_bias": attention,
                "attention_output_bias": attention,
                "gate_up_bias": feed_forward,
                "ffn_down_bias": feed_forward,
                "rotary": _read_rotary(config),
            }
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "general.architecture": "llama",
            "llama.vocab_size": config.vocab_size,
            "llama.context_length": config.max_length,
            "llama.embedding_length": config.hidden_size,
            "llama.block_count": config.layers,
            "llama.feed_forward_length": config.ffn_hidden_size,
            "llama.attention.head_count": config.heads,
            "llama.attention.head_count_kv": config.kv_heads,
            "llama.attention.key_length": config.head_dim,
            "llama.attention.value_length": config.head_dim,
            "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
            "llama.rope.dimension_count": config.head_dim,
            "llama.rope.freq_base": config.rotary.base,
            **_write_rotary(config),
        }

    def rules(self, config: ModelConfig, variant: Variant) -> list[Rule]:
        head = [] if config.tied_embeddings else [same("output.weight", "head.weight")]
        return [*self.body(config, variant.prefix), *head]

    def find_variant(self, config: ModelConfig, names: set[str]) -> Variant:
        return Variant("")

    def body(self, config: ModelConfig, prefix: str) -> list[Rule]:
        rules = [same("token_embd.weight", "embedding.weight")]
        biased = {
            "attention": config.qkv_bias and config.attention_output_bias,
            "feed_forward": config.gate_up_bias and config.ffn_down_bias,
        }
        for i in range(config.layers):
            theirs, ours = f"blk.{i}", f"layers.{i}"
            rules.append(same(f"{theirs}.attn_norm.weight", f"{ours}.attention_norm.weight"))
            rules.append(same(f"{theirs}.ffn_norm.weight", f"{ours}.feed_forward_norm.weight"))
            for published, parameter in _PARTS.items():
                for kind in ("weight", "bias") if biased[parameter.split(".")[0]] else ("weight",):
                    names = (f"{theirs}.{published}.{kind}", f"{ours}.{parameter}.{kind}")
                    turned = published in _TURNED
                    rules.append(paired_rows(*names, 0, config.head_dim) if turned else same(*names))
        return [*rules, same("output_norm.weight", "norm.weight")]


def _read_rotary(config: PublishedConfig) -> dict[str, Any]:
    kind = config.get("llama.rope.scaling.type", "none")
    config.only("llama.rope.scaling.type", "none", "linear", "yarn")
    rotary = {"base": config.get("llama.rope.freq_base", 10_000.0)}
    if kind == "none":
        return rotary
    rotary |= {"rule": kind, "factor": config.need("llama.rope.scaling.factor")}
    if kind == "linear":
        return rotary
    return {
        **rotary,
        "original_length": config.need("llama.rope.scaling.original_context_length"),
        "attention_factor": config.get("llama.rope.scaling.attn_factor", 1.0) * _own_factor(rotary["factor"]),
        "beta_fast": config.get("llama.rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": config.get("llama.rope.scaling.yarn_beta_slow", 1.0),
    }


def _own_factor(factor: float) -> float:
    """What llama.cpp multiplies into cos and sin by itself (ggml's `rope_yarn`)."""
    return 0.1 * math.log(factor) + 1.0


def _write_rotary(config: ModelConfig) -> dict[str, Any]:
    rotary = config.rotary
    if rotary.rule not in ("linear", "yarn"):
        return {}
    written: dict[str, Any] = {"llama.rope.scaling.type": rotary.rule, "llama.rope.scaling.factor": rotary.factor}
    if rotary.rule == "linear":
        return written
    own = _own_factor(rotary.factor)
    return {
        **written,
        "llama.rope.scaling.original_context_length": rotary.original_length,
        "llama.rope.scaling.attn_factor": (rotary.attention_factor or own) / own,
        "llama.rope.scaling.yarn_beta_fast": rotary.beta_fast,
        "llama.rope.scaling.yarn_beta_slow": rotary.beta_slow,
    }
