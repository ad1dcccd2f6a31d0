"""Sizes and costs of a decoder from its configuration alone. Imports no torch: planning runs without it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from zili.config.mixture import LoraConfig
from zili.config.model import ModelConfig

Shape = tuple[int, ...]


def layer_shapes(config: ModelConfig, number: int) -> dict[str, Shape]:
    """Tensors of block `number` by their name inside it; matrices are `[out, in]`, stacks `[experts, out, in]`."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {"attention_norm.weight": (hidden,), "feed_forward_norm.weight": (hidden,)}
    shapes.update(_prefixed("attention", _latent(config) if config.latent else _grouped(config)))
    if config.has_experts(number):
        shapes.update(_prefixed("feed_forward", _mixture(config)))
    else:
        shapes.update(_prefixed("feed_forward", _swiglu(config, config.ffn_hidden_size)))
    return shapes if config.lora is None or number >= config.layers else {**shapes, **_adapters(config.lora, shapes)}


def _adapters(lora: LoraConfig, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """`lora_a [rank, in]` and `lora_b [out, rank]` of each matrix that has them."""
    adapters: dict[str, Shape] = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.rpartition(".")[2] in lora.matrices:
            adapters[f"{module}.lora_a"] = (lora.rank, shape[1])
            adapters[f"{module}.lora_b"] = (shape[0], lora.rank)
    return adapters


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter of low rank."""
    return name.rpartition(".")[2] in ("lora_a", "lora_b")


def is_learned(config: ModelConfig, name: str) -> bool:
    """Whether a parameter of that name has a gradient: beside adapters nothing else has."""
    return config.lora is None or is_adapter(name)


@lru_cache(maxsize=1024)
def kinds_of_layers(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """A layer of each kind, and how many there are of it."""
    dense = config.layers if config.mixture is None else min(config.mixture.dense_layers, config.layers)
    return tuple((layer, times) for layer, times in ((0, dense), (config.layers - 1, config.layers - dense)) if times)


def _prefixed(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _grouped(config: ModelConfig) -> dict[str, Shape]:
    hidden, bias = config.hidden_size, config.qkv_bias
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        **_linear("query", query, hidden, bias),
        **_linear("key", kv, hidden, bias),
        **_linear("value", kv, hidden, bias),
        **_linear("output", hidden, query, config.attention_output_bias),
    }


def _latent(config: ModelConfig) -> dict[str, Shape]:
    latent, hidden, bias = config.latent, config.hidden_size, config.qkv_bias
    assert latent is not None
    plain = config.head_dim - latent.rope_head_dim
    return {
        **_linear("query_down", latent.query_rank, hidden, bias),
        "query_norm.weight": (latent.query_rank,),
        **_linear("key_value_down", latent.key_value_rank + latent.rope_head_dim, hidden, bias),
        "key_value_norm.weight": (latent.key_value_rank,),
        **_linear("query_up", config.heads * config.head_dim, latent.query_rank, False),
        **_linear("key_value_up", config.heads * (plain + latent.value_head_dim), latent.key_value_rank, False),
        **_linear("output", hidden, config.heads * latent.value_head_dim, config.attention_output_bias),
    }


def _swiglu(config: ModelConfig, ffn: int) -> dict[str, Shape]:
    return {
        **_linear("gate", ffn, config.hidden_size, config.gate_up_bias),
        **_linear("up", ffn, config.hidden_size, config.gate_up_bias),
        **_linear("down", config.hidden_size, ffn, config.ffn_down_bias),
    }


def _mixture(config: ModelConfig) -> dict[str, Shape]:
    mixture, hidden = config.mixture, config.hidden_size
    assert mixture is not None
    experts, ffn = mixture.experts, mixture.ffn_hidden_size
    shapes: dict[str, Shape] = {"router.weight": (experts, hidden)}
    if mixture.bias:
        shapes["router.expert_bias"] = (experts,)
    shapes.update({"experts.gate": (experts, ffn, hidden), "experts.up": (experts, ffn, hidden)})
    shapes["experts.down"] = (experts, hidden, ffn)
    if mixture.shared_experts:
        shapes.update(_prefixed("shared", _swiglu(config, mixture.shared_experts * ffn)))
    return shapes


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the decoder by its full name, in the order of the forward pass."""
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, config.hidden_size)}
    for number in range(config.layers):
        shapes.update(named_layer_shapes(config, number))
    shapes["norm.weight"] = (config.hidden_size,)
    if not config.tied_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.hidden_size)
    if config.mtp_layers:
        shapes.update(named_layer_shapes(config, config.layers))
    return shapes


def named_layer_shapes(config: ModelConfig, number: int) -> dict[str, Shape]:
    """Tensors of a layer by their full names. Multi-token prediction counts as one more layer, behind the last."""
    if number < config.layers:
        return _prefixed(f"layers.{number}", layer_shapes(config, number))
    hidden = config.hidden_size
    norms = {f"{name}.weight": (hidden,) for name in ("embedding_norm", "hidden_norm", "norm")}
    block = _prefixed("block", layer_shapes(config, number))
    return _prefixed("next_tokens", {**norms, "projection.weight": (hidden, 2 * hidden), **block})


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by part. A tied head counts once, as the embedding."""

    embedding: int
    attention: int
    feed_forward: int
    """Routers and experts included."""
    norms: int
    head: int
    next_tokens: int
    """Multi-token prediction, which a released model may leave out."""
    idle: int
    """The part of `feed_forward` in experts that a given token does not go through."""

    @property
    def total(self) -> int:
        """Without multi-token prediction, as published totals are."""
        return self.embedding + self.attention + self.feed_forward + self.norms + self.head

    @property
    def active(self) -> int:
        """What one token goes through, embedding and head included, as published figures have it."""
        return self.total - self.idle


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters by part; totals equal the published checkpoints' (facts: index files)."""

    def of(*prefixes: str) -> int:
        return sum(
            times * prod(shape)
            for layer, times in kinds_of_layers(config)
            for name, shape in layer_shapes(config, layer).items()
            if name.startswith(prefixes)
        )

    rows = config.vocab_size * config.hidden_size
    experts, mixture = of("feed_forward.experts."), config.mixture
    further = named_layer_shapes(config, config.layers) if config.mtp_layers else {}
    return ParameterCount(
        embedding=rows,
        attention=of("attention."),
        feed_forward=of("feed_forward."),
        norms=of("attention_norm", "feed_forward_norm") + config.hidden_size,
        head=0 if config.tied_embeddings else rows,
        next_tokens=sum(map(prod, further.values())),
        idle=experts - experts * mixture.top_k // mixture.experts if mixture else 0,
    )


def is_hidden_matrix(name: str, shape: Shape) -> bool:
    """Whether the parameter of that name is what Muon takes: a matrix, or a stack of them, inside the blocks, that of
    multi-token prediction too. A router's is an output matrix (Jordan 2024 leaves those to AdamW)."""
    return len(shape) >= 2 and name.startswith(("layers.", "next_tokens.")) and ".router." not in name


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that a token meets in matrix products: of the blocks, and the head, tied or not."""
    met = config.vocab_size * config.hidden_size
    for layer, times in kinds_of_layers(config):
        for shape in layer_shapes(config, layer).values():
            chosen = config.mixture.top_k if config.mixture is not None and len(shape) == 3 else 1
            met += times * chosen * prod(shape[-2:]) if len(shape) >= 2 else 0
    return met


def forward_flops_per_token(config: ModelConfig, sequence: int) -> float:
    """FLOPs of one token's forward pass in a causal sequence of `sequence` tokens.

    Convention: `2 N + L S H (d + d_v)`, with N = `matmul_parameters` (the head included, the embedding lookup not),
    S `sequence`, d the size of a key and d_v that of a value. A token sees S/2 keys on average and each costs 2 d for
    its score and 2 d_v for its value, in H heads. Norms, rotary, softmax, activations and multi-token prediction are
    left out (Kaplan et al. 2020, table 1; PaLM appendix B without the causal half).
    """
    attention = config.layers * sequence * config.heads * (config.head_dim + config.value_head_dim)
    return 2 * matmul_parameters(config) + attention


def training_flops_per_token(config: ModelConfig, sequence: int) -> float:
    """FLOPs of one token's forward and backward: three times the forward, `6 N + 6 L S H d` where values are as keys.

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


def training_state_bytes(config: ModelConfig, *, optimizer: Literal["adamw", "muon"] = "adamw") -> StateBytes:
    """Memory of weights, gradients and optimizer moments, all in fp32, before any sharding.

    AdamW keeps two moments a parameter. Muon keeps one for the matrices of the blocks (`is_hidden_matrix`) and leaves
    the rest to AdamW. Both also keep a step count a tensor, left out here.
    """
    count = count_parameters(config)
    total = count.total + count.next_tokens
    trained = {
        name: shape
        for name, shape in parameter_shapes(config).items()
        # A router's bias is moved by the load, not by an optimizer.
        if is_learned(config, name) and not name.endswith(".expert_bias")
    }
    elements = sum(map(prod, trained.values()))
    moments = 2 * elements
    if optimizer == "muon":
        moments -= sum(prod(shape) for name, shape in trained.items() if is_hidden_matrix(name, shape))
    return StateBytes(4 * total, 4 * elements, 4 * moments)
