"""The layout of TeleChat (7B, 12B) and TeleChat2 (3B, 7B, 35B, 115B, 39B-A12B), TeleChat2.5 and T1.

Sources: Tele-AI/Telechat models/7B and 12B, Tele-AI/TeleChat2 model/115B (config.json, modeling_telechat.py); for the
mixture of experts of 39B-A12B MindFormers research/telechat2 (names from its weight converter, routing from
infer/moe.py).
"""

from __future__ import annotations

import re
from typing import Any

from zili.config.mixture import MixtureConfig
from zili.config.model import ModelConfig
from zili.errors import CheckpointError
from zili.release.layouts.layout import PublishedConfig, PublishedLayout
from zili.release.layouts.mapping import Rule, interleaved_by_head, same, stacked

_SAME = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attention.query.weight": "attention.query.weight",
    "self_attention.dense.weight": "attention.output.weight",
    "self_attention.dense.bias": "attention.output.bias",
    "post_attention_layernorm.weight": "feed_forward_norm.weight",
}
_DENSE = {
    "mlp.gate_proj.weight": "feed_forward.gate.weight",
    "mlp.up_proj.weight": "feed_forward.up.weight",
    "mlp.down_proj.weight": "feed_forward.down.weight",
    "mlp.down_proj.bias": "feed_forward.down.bias",
}
# A guess: no config.json of 39B-A12B was to be had. These are what other families call the same numbers; the first is
# the one that is written.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk", "top_k")
_WIDTH = ("moe_intermediate_size", "ffn_hidden_size")
_TABLES = "rotary_table_dtype"
"""A key of ours: that cos and sin are not rounded to fp16."""


class TeleChat2(PublishedLayout):
    name = "telechat2"
    prefix = "transformer."
    embedding = "word_embeddings.weight"
    mixtures = True
    ignored = re.compile(r"(^|\.)rotary_emb\.")

    def recognises(self, config: PublishedConfig, names: set[str]) -> bool:
        return any(key in config.values for key in _WIDTH) and any(
            name.endswith("self_attention.key_value.weight") for name in names
        )

    def read_config(self, config: PublishedConfig, names: set[str]) -> ModelConfig:
        config.only("apply_residual_connection_post_layernorm", False)
        config.only("embed_layernorm", False)
        config.only(_TABLES, "float16", "float32")
        if (config.get("rope_scaling") or {}).get("factor", 1.0) != 1.0:
            config.only("rope_scaling", None)
        heads = config.need("n_head")
        # TeleChat-7B stores no head and does not say it is tied; later configs have the key.
        tied = config.get("tie_word_embeddings", "lm_head.weight" not in names)
        # A constant of the first generation's code: 4096 in 7B, whose tensors have no prefix, 8192 in 12B.
        constant = 8192 if self.prefix + self.embedding in names else 4096
        training_length = config.need("training_seqlen")
        mixture = _read_mixture(config, names)
        return config.model(
            {
                "vocab_size": config.need("vocab_size"),
                "hidden_size": config.need("hidden_size"),
                "layers": config.need("n_layer"),
                "heads": heads,
                "kv_heads": config.get("num_key_value_heads", heads),
                "head_dim": config.need("hidden_size") // heads,
                "ffn_hidden_size": mixture["ffn_hidden_size"] if mixture else config.need("ffn_hidden_size"),
                "max_length": config.get("seq_length", training_length),
                "norm_eps": config.need("layer_norm_epsilon"),
                "tied_embeddings": tied,
                "attention_output_bias": True,
                "ffn_down_bias": mixture is None,
                "mixture": mixture,
                "hidden_dropout": config.get("hidden_dropout", 0.0),
                "attention_dropout": config.get("attention_dropout", 0.0),
                "init_std": config.get("initializer_range", 0.02),
                "rotary": {
                    "rule": "telechat_ntk",
                    "base": config.get("rope_theta", 10_000.0),
                    "original_length": config.get("base_seqlen", constant),
                    "training_length": training_length,
                    "half_tables": config.get(_TABLES, "float16") == "float16",
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
            # What engines without the length-dependent rule, vLLM among them, may go to.
            "max_position_embeddings": min(config.max_length, config.rotary.training_length or config.max_length),
            "training_seqlen": config.rotary.training_length or config.max_length,
            "base_seqlen": config.rotary.original_length or config.max_length,
            # Always: who reads it and does not know TeleChat's default takes another.
            "rope_theta": config.rotary.base,
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tied_embeddings,
            "hidden_dropout": config.hidden_dropout,
            "attention_dropout": config.attention_dropout,
            "initializer_range": config.init_std,
            "apply_residual_connection_post_layernorm": False,
            "embed_layernorm": False,
            "flash_attn": True,
            "use_cache": True,
            # transformers knows no TeleChat2, and vLLM only its weights: `remote_code` is what a folder brings along.
            "auto_map": {
                "AutoConfig": "configuration_telechat2.TeleChat2Config",
                "AutoModelForCausalLM": "modeling_telechat2.TeleChat2ForCausalLM",
            },
        }
        if not config.rotary.half_tables:
            values[_TABLES] = "float32"
        return {**values, **_write_mixture(config.mixture)} if config.mixture else values

    def body(self, config: ModelConfig, prefix: str) -> list[Rule]:
        rules = [same(f"{prefix}word_embeddings.weight", "embedding.weight")]
        for i in range(config.layers):
            theirs, ours = f"{prefix}h.{i}", f"layers.{i}"
            alike = _SAME if config.has_experts(i) else {**_SAME, **_DENSE}
            rules += [same(f"{theirs}.{published}", f"{ours}.{parameter}") for published, parameter in alike.items()]
            if config.has_experts(i):
                rules += _experts(config, f"{theirs}.mlp", f"{ours}.feed_forward")
            key, value = f"{ours}.attention.key.weight", f"{ours}.attention.value.weight"
            published = f"{theirs}.self_attention.key_value.weight"
            rules.append(interleaved_by_head(published, key, value, config.head_dim))
        return [*rules, same(f"{prefix}ln_f.weight", "norm.weight")]


def _experts(config: ModelConfig, theirs: str, ours: str) -> list[Rule]:
    assert config.mixture is not None
    rules = [same(f"{theirs}.router.weight", f"{ours}.router.weight")]
    for part in ("gate", "up", "down"):
        name = f"{theirs}.local_experts.{{expert}}.{part}_proj.weight"
        rules += stacked(name, f"{ours}.experts.{part}", config.mixture.experts)
    return rules


def _read_mixture(config: PublishedConfig, names: set[str]) -> dict[str, Any] | None:
    """The mixture of a folder whose layers have experts, every one of them; None: it is dense."""
    if not any(".mlp.local_experts." in name for name in names):
        return None
    # Dense models have biases here. Whether the published mixture has is not known; its trainer has one at w2.
    biases = sorted(name for name in names if re.search(r"\.mlp\.(local_experts\.\d+\.\w+|router)\.bias$", name))
    if biases:
        raise CheckpointError(
            f"{config.path.parent}: {len(biases)} biases in experts or routers (first: {biases[0]}), which Zili's have "
            "not; if all are zero, remove them from the weights"
        )
    return {
        "experts": _first(config, _EXPERTS),
        "top_k": _first(config, _TOP_K),
        "ffn_hidden_size": _first(config, _WIDTH),
        "scoring": "softmax",
        "normalize": config.get("norm_topk_prob", True),
        "balance_loss": config.get("router_aux_loss_coef", 0.0),
    }


def _write_mixture(mixture: MixtureConfig) -> dict[str, Any]:
    return {
        _EXPERTS[0]: mixture.experts,
        _TOP_K[0]: mixture.top_k,
        _WIDTH[0]: mixture.ffn_hidden_size,
        "norm_topk_prob": mixture.normalize,
        "router_aux_loss_coef": mixture.balance_loss,
    }


def _first(config: PublishedConfig, keys: tuple[str, ...]) -> Any:
    """The value of the first of the `keys` that is there."""
    found = next((key for key in keys if config.get(key) is not None), None)
    if found is None:
        raise CheckpointError(f"{config.path}: none of the keys {', '.join(keys)} is there; one must be")
    return config.need(found)
