"""Figures of chip models, each with a source and a confidence. No torch; the planner reads it anywhere."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from zili.chips.backend import CAPABILITIES, Capability, Evidence, nearest
from zili.config.section import Section
from zili.errors import ChipError

Confidence = Literal["H", "M", "L"]

CONFIDENCE: dict[str, str] = {
    "H": "the vendor's own figure, or its arithmetic closes",
    "M": "one decent secondary source",
    "L": "weak or recalled: replace it before you rely on it",
}


class Override(Section):
    """A capability in which this model differs from its backend's record."""

    value: bool
    reason: str
    evidence: Evidence = "documented"


class Figures(Section):
    """Dense peaks and sizes of one chip. What is not published stays None, never 0, never a guess."""

    bf16_tflops: PositiveFloat | None = None
    """10^12 operations a second of the matrix units alone: the denominator of model FLOP utilisation."""
    fp16_tflops: PositiveFloat | None = None
    tf32_tflops: PositiveFloat | None = None
    fp32_tflops: PositiveFloat | None = None
    fp8_tflops: PositiveFloat | None = None
    fp4_tflops: PositiveFloat | None = None
    int8_tops: PositiveFloat | None = None
    int16_tops: PositiveFloat | None = None
    measured_bf16_tflops: PositiveFloat | None = None
    """What a large matrix product reached, by a published benchmark."""
    measured_fp32_tflops: PositiveFloat | None = None
    memory_gb: PositiveFloat | None = None
    """Nominal size; a few per cent less is usable."""
    memory_gb_s: PositiveFloat | None = None
    """10^9 bytes a second."""
    link_gb_s: PositiveFloat | None = None
    """To the other chips of the node, both directions together, all links of one chip."""
    chips_per_node: PositiveInt | None = None
    link_domain: PositiveInt | None = None
    """Chips that reach one another by those links, where it is more than a node."""
    internode_gbit_s: PositiveFloat | None = None
    """10^9 bits a second out of the node, for one chip."""
    watts: PositiveFloat | None = None


class Figure(NamedTuple):
    """A published number and how far to trust it."""

    value: float
    confidence: Confidence


class Chip(Figures):
    """One chip model."""

    name: str
    vendor: str
    family: str | None = None
    """Chips whose kernels behave alike: the planner's efficiencies are of a family."""
    backend: str | None = None
    """Backend that drives it; None where this house has no record (planning only)."""
    aliases: tuple[str, ...] = ()
    """Other names, among them the one the driver reports."""
    source: str = Field(min_length=10)
    confidence: Confidence
    figure_confidence: dict[str, Confidence] = Field(default_factory=dict)
    """Where a figure's differs from the chip's."""
    capabilities: dict[str, Override] = Field(default_factory=dict)
    note: str = ""

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        unpublished = [key for key in self.figure_confidence if getattr(self, key, None) is None]
        unknown = [key for key in self.capabilities if key not in CAPABILITIES]
        if unpublished or unknown:
            raise ValueError(f"no such figure: {unpublished}; no such capability: {unknown}")
        return self

    def figure(self, name: str) -> Figure | None:
        """A figure with its confidence; None where it is not published."""
        value = getattr(self, name)
        return None if value is None else Figure(value, self.figure_confidence.get(name, self.confidence))

    def figures(self) -> dict[str, Figure | None]:
        """Every figure by name, in the order of the catalog."""
        return {name: self.figure(name) for name in Figures.model_fields}

    def require(self, name: str) -> float:
        """A figure that a calculation cannot do without.

        Raises:
            ChipError: it is not published.
        """
        value = getattr(self, name)
        if value is None:
            raise ChipError(f"{name} of {self.name} is not published; measure it on the chip and give it yourself")
        return float(value)

    def overrides(self) -> dict[str, Capability]:
        """Capabilities that differ from the backend's record, in the record's own type."""
        return {key: Capability(o.value, o.reason, o.evidence) for key, o in self.capabilities.items()}


@cache
def catalog() -> dict[str, Chip]:
    """All chips by name, in the order of the file.

    Raises:
        ChipError: catalog.toml is faulty (a defect of the installation).
    """
    text = files("zili.chips").joinpath("catalog.toml").read_text(encoding="utf-8")
    return read_catalog(text)


def read_catalog(text: str) -> dict[str, Chip]:
    """Parse and validate a catalog.

    Raises:
        ChipError: not TOML, an unknown key, a figure that is not positive, or a name that two chips share.
    """
    try:
        chips = {key: Chip(name=key, **table) for key, table in tomllib.loads(text).items()}
    except (tomllib.TOMLDecodeError, ValidationError, TypeError) as error:
        raise ChipError(f"the chip catalog is faulty: {error}") from error
    _by_alias(chips)
    return chips


def find_chip(name: str) -> Chip:
    """A chip by name or alias; case, spaces and punctuation do not count.

    Raises:
        ChipError: unknown; the message has the nearest names.
    """
    found = identify(name)
    if found is None:
        near = _models_of(name) or nearest(name, chip_names())
        raise ChipError(f"no chip is named {name!r}{near} (`zili chips` lists them)")
    return found


def _models_of(name: str) -> str:
    """What to say where `name` is a backend's, or a vendor's."""
    from zili.chips.registry import registry

    types = {backend.device_type: backend.name for backend in registry().backends}
    whose = types.get(name.lower(), name.lower())
    models = [chip.name for chip in catalog().values() if whose in (chip.backend, chip.vendor.lower())]
    return f", which is a vendor's name; its chips are {', '.join(models)}" if models else ""


def chip_names() -> list[str]:
    """Names and aliases, for messages."""
    return [name for chip in catalog().values() for name in (chip.name, *chip.aliases)]


def identify(name: str) -> Chip | None:
    """The chip a driver reports under `name`. Only whole names count: a variant has other figures."""
    return _by_alias(catalog()).get(_folded(name))


def _by_alias(chips: dict[str, Chip]) -> dict[str, Chip]:
    known: dict[str, Chip] = {}
    for chip in chips.values():
        for name in {_folded(name) for name in (chip.name, *chip.aliases)}:
            if name in known:
                raise ChipError(f"the chip catalog gives {name!r} to {known[name].name} and to {chip.name}")
            known[name] = chip
    return known


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
