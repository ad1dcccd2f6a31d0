"""The same function under another layout: what one layout can only say in other words.

A model's own layout may have what others do not: muP multipliers, a bias on one matrix of a layer, a rotary rule that
follows the length. Another model may give the same logits, up to the length that the first was trained for. Then its
configuration and weights are put together here, read from the first's as they are asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zili.config.model import ModelConfig, RotaryConfig
from zili.models.arithmetic import parameter_shapes
from zili.models.rotary import scaling
from zili.release.tensors import Index, Tensors, cut

_ATTENTION = ("query", "key", "value", "output")
_FEED_FORWARD = ("gate", "up", "down")


@dataclass(frozen=True)
class Equivalent:
    """A model that computes what another does."""

    config: ModelConfig
    tensors: Tensors
    """Under Zili's names."""
    notes: tuple[str, ...]
    """Lines for the release's record: what the layout says in other words."""
    exact: bool
    """Whether logits differ by no more than the order of fp32 additions makes them."""


@dataclass
class _Rewriting:
    """A model while it is being said in other words."""

    config: ModelConfig
    multipliers: dict[str, float]
    notes: list[str]
    exact: bool = True

    def change(self, note: str, **fields: Any) -> None:
        self.config = self.config.changed(**fields)
        self.notes.append(note)


def llama_equivalent(config: ModelConfig, tensors: Tensors, *, own_yarn: bool = False) -> Equivalent:
    """The model in Llama's words: no multipliers, biases on all of a group's matrices or none, rotary rules it knows.

    `own_yarn` keeps TeleChat3's form of YaRN, which its own layout has a name for.
    """
    rewriting = _begin(config)
    has_biases = any((config.qkv_bias, config.attention_output_bias, config.gate_up_bias, config.ffn_down_bias))
    if has_biases and config.mixture is None and config.latent is None:
        _complete_biases(rewriting, tensors)
    _settle_ntk(rewriting)
    rotary = rewriting.config.rotary
    if rotary.rule == "telechat3_yarn" and not own_yarn:
        factor = scaling(rotary, config.rotary_dim, 1).magnitude
        rewriting.change(
            f"TeleChat3's YaRN is YaRN with attention_factor {factor:.6g}",
            rotary={"rule": "yarn", "attention_factor": factor},
        )
    return _end(rewriting, tensors)


def telechat2_equivalent(config: ModelConfig, tensors: Tensors) -> Equivalent:
    """The model in TeleChat2's words: biases after attention and feed-forward, and a base that its rule keeps."""
    rewriting = _begin(config)
    if config.latent is None and not config.qkv_bias and not config.gate_up_bias:
        wanted = {"attention_output_bias": True, "ffn_down_bias": config.mixture is None}
        added = [name for name, value in wanted.items() if value and not getattr(config, name)]
        if added:
            rewriting.change("biases of zero after attention and feed-forward", **wanted)
    mixture = config.mixture
    if mixture is not None and not mixture.dense_layers:
        # No layer has it; the layout has one number for both.
        rewriting.config = rewriting.config.changed(ffn_hidden_size=mixture.ffn_hidden_size)
    rotary = config.rotary
    if rotary.rule == "tele_flm_ntk" or _base_moved(rotary, config.rotary_dim):
        _settle_ntk(rewriting, keep_tables=True)
    now = rewriting.config
    if now.rotary.rule == "plain":
        own = RotaryConfig(
            rule="telechat_ntk",
            base=now.rotary.base,
            original_length=now.max_length,
            training_length=now.max_length,
            half_tables=rotary.rule == "telechat_ntk" and rotary.half_tables,
        )
        rewriting.config = now.changed(rotary=own)
    return _end(rewriting, tensors)


def _base_moved(rotary: RotaryConfig, rotary_dim: int) -> bool:
    """Whether telechat_ntk has another base than its own at the length of training already: vLLM takes one base."""
    length = rotary.training_length or 1
    return rotary.rule == "telechat_ntk" and scaling(rotary, rotary_dim, length).base != rotary.base


def _begin(config: ModelConfig) -> _Rewriting:
    rewriting = _Rewriting(config, {}, [])
    if config.mtp_layers:
        rewriting.change(
            "the layer that predicts the token after the next is left out: training alone uses it", mtp_layers=0
        )
    embedding, logits = config.embedding_multiplier, config.logit_multiplier
    if (embedding, logits) != (1.0, 1.0):
        tied = config.tied_embeddings and embedding == logits
        rewriting.multipliers = {"embedding.weight": embedding, "head.weight": logits}
        rewriting.change(
            f"embedding times {embedding:.6g} and head times {logits:.6g}, muP's multipliers, are in the weights",
            embedding_multiplier=1.0,
            logit_multiplier=1.0,
            tied_embeddings=tied,
        )
    return rewriting


def _complete_biases(rewriting: _Rewriting, tensors: Tensors) -> None:
    """Llama has biases on all four matrices of attention or on none, and likewise on the feed-forward's three."""
    config = rewriting.config
    attention = _any_nonzero(config, tensors, "attention", _ATTENTION)
    feed_forward = _any_nonzero(config, tensors, "feed_forward", _FEED_FORWARD)
    before = (config.qkv_bias, config.attention_output_bias, config.gate_up_bias, config.ffn_down_bias)
    if before == (attention, attention, feed_forward, feed_forward):
        return
    said = " and ".join(name for name, value in (("attention", attention), ("feed-forward", feed_forward)) if value)
    rewriting.change(
        f"biases on every matrix of {said}, zero where there were none" if said else "biases, all zero, left out",
        qkv_bias=attention,
        attention_output_bias=attention,
        gate_up_bias=feed_forward,
        ffn_down_bias=feed_forward,
    )


def _any_nonzero(config: ModelConfig, tensors: Tensors, group: str, parts: tuple[str, ...]) -> bool:
    described = tensors.describe()
    names = (f"layers.{layer}.{group}.{part}.bias" for layer in range(config.layers) for part in parts)
    return any(name in described and bool(tensors.read(name).any()) for name in names)


def _settle_ntk(rewriting: _Rewriting, *, keep_tables: bool = False) -> None:
    """A base that follows the length, as it is up to the length of training: one number."""
    config = rewriting.config
    rotary = config.rotary
    if rotary.rule not in ("telechat_ntk", "tele_flm_ntk"):
        return
    reach = rotary.training_length if rotary.rule == "telechat_ntk" else rotary.original_length
    assert reach
    length = min(config.max_length, reach)
    base = scaling(rotary, config.rotary_dim, length).base
    notes = [f"rotary base {base:.10g}, as the length-dependent rule has it up to {length:,} tokens"]
    if length < config.max_length:
        notes.append(f"context {length:,} instead of {config.max_length:,}: beyond, the rule changes the base")
    if not keep_tables and rotary.rule == "telechat_ntk" and rotary.half_tables:
        notes.append("rotary tables in fp32, where the published code rounds them to fp16 (training did not)")
        rewriting.exact = False
    rewriting.change("; ".join(notes), rotary=RotaryConfig(base=base), max_length=length)


def _end(rewriting: _Rewriting, tensors: Tensors) -> Equivalent:
    rewritten = RewrittenTensors(tensors, rewriting.config, rewriting.multipliers)
    inexact = [m for m in rewriting.multipliers.values() if math.frexp(m)[0] != 0.5]
    if inexact and any(tensor.dtype != torch.float32 for tensor in tensors.describe().values()):
        rewriting.notes.append("multiplied weights are rounded to the stored dtype again")
        rewriting.exact = False
    return Equivalent(rewriting.config, rewritten, tuple(rewriting.notes), rewriting.exact)


class RewrittenTensors(Tensors):
    """Those of `config`, from others: multiplied, zero where there are none, the head a copy of a tied embedding."""

    def __init__(self, tensors: Tensors, config: ModelConfig, multipliers: dict[str, float]) -> None:
        self._tensors = tensors
        self._multipliers = multipliers
        self._shapes = parameter_shapes(config)
        self._there = tensors.describe()

    def describe(self) -> dict[str, Tensor]:
        default = self._there["embedding.weight"].dtype
        return {
            name: torch.empty(shape, dtype=self._dtype(name, default), device="meta")
            for name, shape in self._shapes.items()
        }

    def _dtype(self, name: str, default: torch.dtype) -> torch.dtype:
        source = self._source(name)
        return default if source is None else self._there[source].dtype

    def _source(self, name: str) -> str | None:
        if name in self._there:
            return name
        return "embedding.weight" if name == "head.weight" else None

    def read(self, name: str, index: Index | None = None) -> Tensor:
        source = self._source(name)
        if source is None:
            return cut(torch.zeros(self._shapes[name], dtype=self._there["embedding.weight"].dtype), index)
        tensor = self._tensors.read(source, index)
        multiplier = self._multipliers.get(name, 1.0)
        return tensor if multiplier == 1.0 else (tensor.float() * multiplier).to(tensor.dtype)
