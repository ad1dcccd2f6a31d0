"""What a published checkpoint layout is, and how one is recognised."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from zili.config.model import ModelConfig
from zili.errors import CheckpointError
from zili.models.arithmetic import parameter_shapes
from zili.release.layouts.mapping import Rule, merged, same

Shape = tuple[int, ...]

# Fields that do not change what a trained model computes.
_TRAINING_ONLY: dict[str, Any] = {
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "init_std", "mtp_loss_weight"), True),
    "mixture": {"bias_update_rate": True, "balance_loss": True},
}
_MIXTURE_KEYS = (
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "num_moe_experts",
    "moe_intermediate_size",
)


@dataclass(frozen=True)
class PublishedConfig:
    """A config.json, with errors that name the file, the key and its value."""

    path: Path
    values: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where the key is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value, which must be there."""
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: key {key!r} is missing; fetch the model's own config.json")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse any value but the `allowed` ones; an absent key passes."""
        value = self.get(key)
        if value is not None and value not in allowed:
            supported = " or ".join(repr(item) for item in allowed)
            raise CheckpointError(f"{self.path}: {key} = {value!r} is not supported, only {supported} is")

    def must_be(self, key: str, value: Any) -> None:
        """Refuse any value but `value`, an absent key too."""
        self.need(key)
        self.only(key, value)

    def model(self, fields: dict[str, Any]) -> ModelConfig:
        """`fields` as a ModelConfig, its refusals told as this file's."""
        try:
            return ModelConfig(**fields)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}" for e in error.errors())
            raise CheckpointError(f"{self.path} describes no model of ours: {problems}") from error


@dataclass(frozen=True)
class Variant:
    """How one folder uses its layout's freedoms."""

    prefix: str
    """Before every name but the head's: `transformer.`, `model.` or nothing."""
    repeats_head: bool = False
    """A tied model's embedding was stored a second time, as the head."""


class PublishedLayout(ABC):
    """One way of publishing a decoder: names and shapes of tensors, keys of config.json."""

    name: str
    prefix: str
    """The usual one of `Variant.prefix`."""
    embedding: str
    mixtures = False
    """Whether some models of this layout have experts."""
    ignored: re.Pattern[str]
    """Tensors that carry nothing: masks and frequencies some versions of the published code stored."""

    @abstractmethod
    def recognises(self, config: PublishedConfig, names: set[str]) -> bool:
        """Whether keys and tensor names are both this layout's; three of them share one model_type."""

    @abstractmethod
    def read_config(self, config: PublishedConfig, names: set[str]) -> ModelConfig:
        """The shape; CheckpointError for a key whose value the decoder has no maths for."""

    @abstractmethod
    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """config.json for a model that has none to carry over."""

    @abstractmethod
    def body(self, config: ModelConfig, prefix: str) -> list[Rule]:
        """Rules of everything but the head."""

    def rules(self, config: ModelConfig, variant: Variant) -> list[Rule]:
        """One rule for each published tensor."""
        rules = self.body(config, variant.prefix)
        if not config.tied_embeddings:
            rules.append(same("lm_head.weight", "head.weight"))
        elif variant.repeats_head:
            # No parameter of its own to fill; on the way out a copy, since shards may not share storage.
            rules.append(Rule("lm_head.weight", ("embedding.weight",), merge=lambda t: t.clone()))
        return rules

    def find_variant(self, config: ModelConfig, names: set[str]) -> Variant:
        """Prefix and repeated head, from the names present."""
        prefix = self.prefix if self.prefix + self.embedding in names else ""
        return Variant(prefix, config.tied_embeddings and "lm_head.weight" in names)

    def published_shapes(self, config: ModelConfig, variant: Variant) -> dict[str, Shape]:
        """Names and shapes a folder of this layout must have: the rules applied to Zili's shapes."""
        ours = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(config).items()}
        return {rule.published: tuple(merged(rule, ours).shape) for rule in self.rules(config, variant)}

    def repeats(self, config: ModelConfig, variant: Variant, names: set[str]) -> dict[str, str]:
        """Published tensors that must equal another one: their names to the other's."""
        return {"lm_head.weight": variant.prefix + self.embedding} if variant.repeats_head else {}

    def unsupported(self, config: ModelConfig) -> list[str]:
        """Why this layout cannot hold the model: fields that would read back as something else.

        What only matters in training, such as dropout and init_std, is left out.
        """
        names = {rule.published for rule in self.rules(config, Variant(self.prefix))}
        written = PublishedConfig(Path("config.json"), self.write_config(config))
        before, after = _flat(config), _flat(self.read_config(written, names))
        return [
            f"{key} = {value!r} would read back as {after.get(key)!r}"
            for key, value in before.items()
            if not _equal(value, after.get(key))
        ]


def _flat(config: ModelConfig) -> dict[str, Any]:
    table = config.model_dump(exclude=_TRAINING_ONLY)
    if config.rotary.rule != "telechat_ntk":
        del table["rotary"]["half_tables"]
    return {f"rotary.{key}": value for key, value in table.pop("rotary").items()} | table


def _equal(a: Any, b: Any) -> bool:
    # 1 / (1 / x) is not always x.
    return math.isclose(a, b, rel_tol=1e-12) if isinstance(a, float) and isinstance(b, float) else a == b


def refuse_mixtures(config: PublishedConfig) -> None:
    """Raise CheckpointError for a mixture-of-experts model, naming the key that says so."""
    for key in _MIXTURE_KEYS:
        if config.get(key):
            raise CheckpointError(
                f"{config.path}: {key} = {config.get(key)!r}, a mixture of experts of no layout that this version "
                "reads; use a dense checkpoint, or one in TeleChat2's or DeepSeek-V3's layout"
            )


def recognise(layouts: tuple[PublishedLayout, ...], config: PublishedConfig, names: set[str]) -> PublishedLayout:
    """The layout of a folder, by its config keys and tensor names together.

    Raises:
        CheckpointError: no layout fits, or none that has this mixture of experts.
    """
    for layout in layouts:
        if layout.recognises(config, names):
            if not layout.mixtures:
                refuse_mixtures(config)
            return layout
    refuse_mixtures(config)
    sample = ", ".join(sorted(names)[:3])
    known = ", ".join(layout.name for layout in layouts)
    raise CheckpointError(
        f"{config.path}: unknown architecture (model_type {config.get('model_type')!r}, architectures "
        f"{config.get('architectures')}, tensors like {sample}); known layouts: {known}"
    )
