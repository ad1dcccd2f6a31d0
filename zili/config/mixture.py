"""The parts of a shape that only some models have: a mixture of experts, latent attention, adapters."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from zili.config.section import Section


class MixtureConfig(Section):
    """Experts in place of the feed-forward layer; each token goes through `top_k` of them. No token is dropped."""

    experts: PositiveInt
    top_k: PositiveInt
    ffn_hidden_size: PositiveInt
    """Inner size of one expert."""
    shared_experts: NonNegativeInt = 0
    """Experts that every token goes through, as one layer of so many times `ffn_hidden_size`."""
    dense_layers: NonNegativeInt = 0
    """First layers that have a plain feed-forward layer (of `model.ffn_hidden_size`) instead."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    """Divide the weights of the chosen experts by their sum."""
    scale: PositiveFloat = 1.0
    """Routed outputs are multiplied by it."""
    bias: bool = False
    """Experts are chosen by score plus a bias, which balances their load without a loss."""
    bias_update_rate: NonNegativeFloat = 0.0
    """What a bias moves by after each step: up for experts with less than the mean load, down for those with more."""
    balance_loss: NonNegativeFloat = 0.0
    """Coefficient of the balance loss, computed a sequence at a time."""

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) is more than experts ({self.experts})")
        if self.bias_update_rate and not self.bias:
            raise ValueError("bias_update_rate needs bias = true")
        return self


class LatentConfig(Section):
    """Multi-head latent attention: queries, keys and values are made from short vectors (DeepSeek-V2, section 2.1)."""

    query_rank: PositiveInt
    key_value_rank: PositiveInt
    rope_head_dim: PositiveInt
    """Part of a query or key that is turned by its position; `model.head_dim` counts it in. Keys share it."""
    value_head_dim: PositiveInt


ADAPTED = ("query", "key", "value", "output", "gate", "up", "down")


class LoraConfig(Section):
    """Adapters of low rank beside matrices that stay as they are (Hu et al. 2021, LoRA): `W + alpha / rank B A`.

    They alone are trained. What reads a checkpoint of such a run, `zili chat` or `zili export`, finds them merged.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    matrices: tuple[str, ...] = ADAPTED
    """Names of the blocks' matrices that get one: query, key, value, output, gate, up, down; of latent attention
    query_up and key_value_up. Not experts and routers."""

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / self.rank
