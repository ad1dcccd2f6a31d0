"""The layout of TeleChat-52B: GPT-2's names and transposed matrices, SwiGLU, RMSNorm and muP multipliers.

Source: Tele-AI/TeleChat-52B models/config.json, modeling_telechat.py and pytorch_model.bin.index.json.
"""

from __future__ import annotations

import re
from typing import Any

from zili.config.model import ModelConfig
from zili.release.layouts.layout import PublishedConfig, PublishedLayout
from zili.release.layouts.mapping import Rule, same, transposed_columns
from zili.release.layouts.mup import PUBLISHED_LENGTH, read_mup, write_mup

# GPT-2 itself has these tensor names; each of these keys must be there and say this.
_FIXED = {
    "activation_function": "silu",
    "add_bias_linear": False,
    "relative_encoding": "rotary",
    "rotary_use_xpos": False,
    "scale_attn_weights": True,
    "use_RMSNorm": True,
}


class TeleChat52(PublishedLayout):
    """Matrices are Conv1D's `[in, out]`; c_attn is query | key | value, c_fc is gate | up, side by side."""

    name = "telechat52"
    prefix = "transformer."
    embedding = "wte.weight"
    ignored = re.compile(r"\.attn\.(masked_bias|bias)$|(^|\.)wpe\.")

    def recognises(self, config: PublishedConfig, names: set[str]) -> bool:
        return "n_embd" in config.values and any(name.endswith("attn.c_attn.weight") for name in names)

    def read_config(self, config: PublishedConfig, names: set[str]) -> ModelConfig:
        for key, value in _FIXED.items():
            config.must_be(key, value)
        hidden, heads = config.need("n_embd"), config.need("n_head")
        return config.model(
            {
                "vocab_size": config.need("vocab_size"),
                "hidden_size": hidden,
                "layers": config.need("n_layer"),
                "heads": heads,
                "kv_heads": heads,
                "head_dim": hidden // heads,
                "ffn_hidden_size": config.get("n_inner", 4 * hidden),
                "max_length": config.need("n_positions"),
                "norm_eps": config.need("layer_norm_epsilon"),
                "tied_embeddings": config.get("tie_word_embeddings", "lm_head.weight" not in names),
                "hidden_dropout": config.get("resid_pdrop", 0.0),
                "attention_dropout": config.get("attn_pdrop", 0.0),
                "init_std": config.get("initializer_range", 0.02),
                **read_mup(config),
                "rotary": {
                    "rule": "tele_flm_ntk",
                    "base": config.need("rotary_theta"),
                    "original_length": PUBLISHED_LENGTH,
                },
            }
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "architectures": ["TELECHAT"],
            "model_type": "telechat",
            "vocab_size": config.vocab_size,
            "n_embd": config.hidden_size,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": config.ffn_hidden_size,
            "n_positions": config.max_length,
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tied_embeddings,
            "resid_pdrop": config.hidden_dropout,
            "attn_pdrop": config.attention_dropout,
            "embd_pdrop": 0.0,
            "initializer_range": config.init_std,
            "rotary_theta": config.rotary.base,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
            "enable_flash_attn": True,
            "use_cache": True,
            **_FIXED,
            **write_mup(config),
        }

    def body(self, config: ModelConfig, prefix: str) -> list[Rule]:
        query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        rules = [same(f"{prefix}wte.weight", "embedding.weight")]
        for i in range(config.layers):
            theirs, ours = f"{prefix}h.{i}", f"layers.{i}"
            attention = tuple(f"{ours}.attention.{part}.weight" for part in ("query", "key", "value"))
            gate_up = tuple(f"{ours}.feed_forward.{part}.weight" for part in ("gate", "up"))
            rules += [
                same(f"{theirs}.ln_1.weight", f"{ours}.attention_norm.weight"),
                transposed_columns(f"{theirs}.attn.c_attn.weight", attention, (query, kv, kv)),
                transposed_columns(f"{theirs}.attn.c_proj.weight", (f"{ours}.attention.output.weight",), (hidden,)),
                same(f"{theirs}.ln_2.weight", f"{ours}.feed_forward_norm.weight"),
                transposed_columns(f"{theirs}.mlp.c_fc.weight", gate_up, (ffn, ffn)),
                transposed_columns(f"{theirs}.mlp.c_proj.weight", (f"{ours}.feed_forward.down.weight",), (hidden,)),
            ]
        return [*rules, same(f"{prefix}ln_f.weight", "norm.weight")]
