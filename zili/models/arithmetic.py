"""Sizes and costs of a decoder from its configuration alone. Imports no torch: planning runs without it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from zili.config.model import ModelConfig

Shape = tuple[int, ...]


def layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Parameters of one block by their name inside it; matrices are `[out, in]`."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    matrices = {
        "attention.query": (query, hidden, config.qkv_bias),
        "attention.key": (kv, hidden, config.qkv_bias),
        "attention.value": (kv, hidden, config.qkv_bias),
        "attention.output": (hidden, query, config.attention_output_bias),
        "feed_forward.gate": (ffn, hidden, config.gate_up_bias),
        "feed_forward.up": (ffn, hidden, config.gate_up_bias),
        "feed_forward.down": (hidden, ffn, config.ffn_down_bias),
    }
    shapes: dict[str, Shape] = {"attention_norm.weight": (hidden,), "feed_forward_norm.weight": (hidden,)}
    for name, (rows, columns, bias) in matrices.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the decoder by its full name, in the order of the forward pass."""
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, config.hidden_size)}
    block = layer_shapes(config)
    for i in range(config.layers):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in block.items()})
    shapes["norm.weight"] = (config.hidden_size,)
    if not config.tied_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by part. A tied head counts once, as the embedding."""

    embedding: int
    attention: int
    feed_forward: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.feed_forward + self.norms + self.head


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters by part; totals equal the published checkpoints' (facts: index files)."""
    block = layer_shapes(config)

    def of(prefix: str) -> int:
        return config.layers * sum(prod(shape) for name, shape in block.items() if name.startswith(prefix))

    rows = config.vocab_size * config.hidden_size
    return ParameterCount(
        embedding=rows,
        attention=of("attention."),
        feed_forward=of("feed_forward."),
        norms=of("attention_norm") + of("feed_forward_norm") + config.hidden_size,
        head=0 if config.tied_embeddings else rows,
    )


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters in matrix products: every matrix of the blocks, and the head, tied or not."""
    block = sum(prod(shape) for shape in layer_shapes(config).values() if len(shape) == 2)
    return config.layers * block + config.vocab_size * config.hidden_size


def forward_flops_per_token(config: ModelConfig, sequence: int) -> float:
    """FLOPs of one token's forward pass in a causal sequence of `sequence` tokens.

    Convention: `2 N + 2 L S H d`, with N = `matmul_parameters` (the head included, the embedding lookup not)
    and S `sequence`. A token sees S/2 keys on average and each costs 2 d for its score and 2 d for its value,
    in H heads. Norms, rotary, softmax and activations are left out (Kaplan et al. 2020, table 1; PaLM
    appendix B without the causal half).
    """
    attention = 2 * config.layers * sequence * config.heads * config.head_dim
    return 2 * matmul_parameters(config) + attention


def training_flops_per_token(config: ModelConfig, sequence: int) -> float:
    """FLOPs of one token's forward and backward: `6 N + 6 L S H d`, three times the forward.

    Recomputed activations are not counted: this is the numerator of model FLOPs utilisation, not of
    hardware's.
    """
    return 3 * forward_flops_per_token(config, sequence)


@dataclass(frozen=True)
class StateBytes:
    """Bytes that training keeps between steps, over all ranks together."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def training_state_bytes(
    config: ModelConfig,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    weight_bytes: int = 4,
    gradient_bytes: int = 4,
    moment_bytes: int = 4,
) -> StateBytes:
    """Memory of weights, gradients and optimizer moments, before any sharding.

    AdamW keeps two moments a parameter. Muon keeps one for the matrices of the blocks and leaves embedding,
    head, norms and biases to AdamW, as `zili.training` does. Both also keep a step count a tensor, left out
    here.
    """
    total = count_parameters(config).total
    moments = 2 * total
    if optimizer == "muon":
        moments -= matmul_parameters(config) - config.vocab_size * config.hidden_size
    return StateBytes(weight_bytes * total, gradient_bytes * total, moment_bytes * moments)
