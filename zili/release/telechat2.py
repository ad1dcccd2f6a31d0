"""The layout of TeleChat (7B, 12B) and TeleChat2 (3B, 7B, 35B, 115B), TeleChat2.5 and T1.

Sources: Tele-AI/Telechat models/7B and 12B, Tele-AI/TeleChat2 model/115B (config.json, modeling_telechat.py).
"""

from __future__ import annotations

import re
from typing import Any

from zili.config.model import ModelConfig
from zili.release.layout import Layout, PublishedConfig
from zili.release.mapping import Rule, interleaved_by_head, same

_SAME = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attention.query.weight": "attention.query.weight",
    "self_attention.dense.weight": "attention.output.weight",
    "self_attention.dense.bias": "attention.output.bias",
    "post_attention_layernorm.weight": "feed_forward_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.gate.weight",
    "mlp.up_proj.weight": "feed_forward.up.weight",
    "mlp.down_proj.weight": "feed_forward.down.weight",
    "mlp.down_proj.bias": "feed_forward.down.bias",
}


class TeleChat2(Layout):
    name = "telechat2"
    prefix = "transformer."
    embedding = "word_embeddings.weight"
    ignored = re.compile(r"(^|\.)rotary_emb\.")

    def recognises(self, config: PublishedConfig, names: set[str]) -> bool:
        return "ffn_hidden_size" in config.values and any(
            name.endswith("self_attention.key_value.weight") for name in names
        )

    def read_config(self, config: PublishedConfig, names: set[str]) -> ModelConfig:
        config.only("apply_residual_connection_post_layernorm", False)
        config.only("embed_layernorm", False)
        if (config.get("rope_scaling") or {}).get("factor", 1.0) != 1.0:
            config.only("rope_scaling", None)
        heads = config.need("n_head")
        # TeleChat-7B stores no head and does not say it is tied; later configs have the key.
        tied = config.get("tie_word_embeddings", "lm_head.weight" not in names)
        # A constant of the first generation's code: 4096 in 7B, whose tensors have no prefix, 8192 in 12B.
        constant = 8192 if self.prefix + self.embedding in names else 4096
        training_length = config.need("training_seqlen")
        return config.model(
            {
                "vocab_size": config.need("vocab_size"),
                "hidden_size": config.need("hidden_size"),
                "layers": config.need("n_layer"),
                "heads": heads,
                "kv_heads": config.get("num_key_value_heads", heads),
                "head_dim": config.need("hidden_size") // heads,
                "ffn_hidden_size": config.need("ffn_hidden_size"),
                "max_length": config.get("seq_length", training_length),
                "norm_eps": config.need("layer_norm_epsilon"),
                "tied_embeddings": tied,
                "attention_output_bias": True,
                "ffn_down_bias": True,
                "hidden_dropout": config.get("hidden_dropout", 0.0),
                "attention_dropout": config.get("attention_dropout", 0.0),
                "init_std": config.get("initializer_range", 0.02),
                "rotary": {
                    "rule": "telechat_ntk",
                    "base": config.get("rope_theta", 10_000.0),
                    "original_length": config.get("base_seqlen", constant),
                    "training_length": training_length,
                },
            }
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        values = {
            "architectures": ["TeleChat2ForCausalLM"],
            "model_type": "telechat",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "n_layer": config.layers,
            "n_head": config.heads,
            "num_key_value_heads": config.kv_heads,
            "ffn_hidden_size": config.ffn_hidden_size,
            "seq_length": config.max_length,
            "training_seqlen": config.rotary.training_length or config.max_length,
            "base_seqlen": config.rotary.original_length or config.max_length,
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tied_embeddings,
            "hidden_dropout": config.hidden_dropout,
            "attention_dropout": config.attention_dropout,
            "initializer_range": config.init_std,
            "apply_residual_connection_post_layernorm": False,
            "embed_layernorm": False,
            "flash_attn": True,
            "use_cache": True,
        }
        if config.rotary.base != 10_000.0:
            values["rope_theta"] = config.rotary.base
        return values

    def body(self, config: ModelConfig, prefix: str) -> list[Rule]:
        rules = [same(f"{prefix}word_embeddings.weight", "embedding.weight")]
        for i in range(config.layers):
            theirs, ours = f"{prefix}h.{i}", f"layers.{i}"
            rules += [same(f"{theirs}.{published}", f"{ours}.{parameter}") for published, parameter in _SAME.items()]
            key, value = f"{ours}.attention.key.weight", f"{ours}.attention.value.weight"
            published = f"{theirs}.self_attention.key_value.weight"
            rules.append(interleaved_by_head(published, key, value, config.head_dim))
        return [*rules, same(f"{prefix}ln_f.weight", "norm.weight")]
