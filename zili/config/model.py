"""The shape of a decoder, as data. One table describes every model of the family."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from zili.config.mixture import LatentConfig, LoraConfig, MixtureConfig
from zili.config.section import Section

RotaryRule = Literal["plain", "linear", "llama3", "yarn", "telechat3_yarn", "telechat_ntk", "tele_flm_ntk"]


class RotaryConfig(Section):
    """How positions turn queries and keys; `zili.models.rotary` holds the formulas and their sources."""

    rule: RotaryRule = "plain"
    base: PositiveFloat = 10_000.0
    factor: PositiveFloat = 1.0
    """Length extension, for linear, llama3 and both yarn rules."""
    original_length: PositiveInt | None = None
    """Tokens: length before extension (llama3, yarn), or base_seqlen (telechat_ntk, tele_flm_ntk)."""
    training_length: PositiveInt | None = None
    """Tokens: training_seqlen, the shortest length the telechat_ntk rule assumes."""
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0
    attention_factor: PositiveFloat | None = None
    """Multiplied into cos and sin; None takes the rule's own."""
    half_tables: bool = True
    """telechat_ntk: cos and sin rounded to fp16, as TeleChat2's published code does. Its training did not, nor does
    vLLM: false for models of your own, so that a release computes what was trained."""

    @model_validator(mode="after")
    def _lengths_present(self) -> Self:
        needs = {
            "llama3": ("original_length",),
            "yarn": ("original_length",),
            "telechat3_yarn": ("original_length",),
            "telechat_ntk": ("original_length", "training_length"),
            "tele_flm_ntk": ("original_length",),
        }
        for name in needs.get(self.rule, ()):
            if getattr(self, name) is None:
                raise ValueError(f"rotary rule {self.rule!r} needs {name}")
        return self


class ModelConfig(Section):
    """A pre-norm decoder with RMSNorm, SwiGLU and rotary positions; attention grouped or latent, experts or none."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    layers: int = Field(gt=0, le=2_000)
    """Published models have up to 126; a plan goes through them one by one."""
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn_hidden_size: PositiveInt
    max_length: PositiveInt = 8192
    """Tokens the model is meant for; rotary rules may reach further."""
    norm_eps: PositiveFloat = 1e-5
    tied_embeddings: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    gate_up_bias: bool = False
    ffn_down_bias: bool = False
    embedding_multiplier: PositiveFloat = 1.0
    """muP input_mult: embeddings are multiplied by it."""
    logit_multiplier: PositiveFloat = 1.0
    """muP output_mult / mup_scale_factor: logits are multiplied by it."""
    hidden_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    attention_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    init_std: PositiveFloat = 0.02
    mtp_layers: int = Field(0, ge=0, le=1)
    """Layers that predict the token after the next one (multi-token prediction); used in training only."""
    mtp_loss_weight: NonNegativeFloat = 0.3
    rotary: RotaryConfig = RotaryConfig()
    mixture: MixtureConfig | None = None
    latent: LatentConfig | None = None
    lora: LoraConfig | None = None

    @property
    def rotary_dim(self) -> int:
        """What of a head is turned by its position."""
        return self.latent.rope_head_dim if self.latent else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Size of one head's value."""
        return self.latent.value_head_dim if self.latent else self.head_dim

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer`, from 0, has a mixture of experts."""
        return self.mixture is not None and layer >= self.mixture.dense_layers

    @model_validator(mode="after")
    def _latent_heads(self) -> Self:
        if self.latent is None:
            return self
        if self.kv_heads != self.heads:
            raise ValueError(f"latent attention makes a key for each head: kv_heads ({self.kv_heads}) must be heads")
        if self.latent.rope_head_dim >= self.head_dim or self.latent.rope_head_dim % 2:
            raise ValueError(
                f"latent.rope_head_dim ({self.latent.rope_head_dim}) must be even and less than head_dim "
                f"({self.head_dim}), which counts it in"
            )
        return self

    @model_validator(mode="after")
    def _adapted_matrices(self) -> Self:
        if self.lora is None:
            return self
        latent = ("query_down", "query_up", "key_value_down", "key_value_up", "output", "gate", "up", "down")
        there = latent if self.latent else ("query", "key", "value", "output", "gate", "up", "down")
        for name in self.lora.matrices:
            if name not in there:
                raise ValueError(f"lora.matrices: {name!r} is none of this model's: {', '.join(there)}")
        # The last three are a plain feed-forward layer's, or the shared experts'.
        experts_alone = self.mixture and not self.mixture.dense_layers and not self.mixture.shared_experts
        adapted = there[:-3] if experts_alone else there
        if not set(self.lora.matrices) & set(adapted):
            raise ValueError(
                f"lora.matrices {list(self.lora.matrices)} leaves nothing to train; name some of {', '.join(adapted)}"
            )
        return self

    @model_validator(mode="after")
    def _heads_group(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) is not a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) is odd; rotary positions turn pairs")
        return self
