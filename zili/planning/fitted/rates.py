"""Shares of a chip's figures that training reaches, fitted to published runs by `benchmarks/planner/fit.py`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from math import exp
from typing import Any

from zili.planning.fitted.machine import Machine
from zili.planning.run import Precision, Run


@dataclass(frozen=True)
class Rates:
    """Efficiencies. Those that kernels decide are a family's of chips, the others common to all."""

    products: float
    """Share of the peak that a large bf16 product reaches on a chip with power to spare."""
    attention: float
    """Share of the products' rate that fused attention reaches."""
    watts_per_tflops: float
    """Watts that a TFLOP/s of bf16 products takes: with less, a chip lowers its clock."""
    fp8: float
    """Share of the peak in 8 bits, over bf16's share of its peak."""
    fp4: float
    experts: float
    """Share of a plain product's rate that products of many wide experts reach."""
    expert_width: float
    """Size of an expert's smaller side at which it reaches half of that."""
    operands: float
    """How often the operands of a product go through memory."""
    memory: float
    """Share of the memory's bandwidth that kernels reach."""
    passes: float
    """How often what lies between products goes through memory, against a count for fused kernels."""
    score_passes: float
    """How often scores do, where attention is not fused."""
    logit_passes: float
    """How often logits do, at two bytes."""
    launch: float
    """Seconds of a layer's forward pass whatever its size: starting kernels."""
    link: float
    """Share of the links inside a domain that collectives reach."""
    network: float
    """The same between domains."""
    hop: float
    """Seconds of a message from domain to domain."""
    hide_tensor: float
    """Share of what goes between tensor-parallel processes that is hidden, where software tries."""
    hide_data: float
    """Share of the arithmetic beside which weights and gradients can travel."""
    hide_expert: float
    hide_pipeline: float
    waiting: float
    """Share of a step lost to the slowest chip each time the number of chips doubles, from eight on."""
    untuned: float
    """Speed of arithmetic in software that the chip's vendor did not tune."""

    def product_rate(self, machine: Machine, precision: Precision) -> float:
        """FLOPs a second of a large product."""
        if precision == "bf16":
            peak, share = machine.peak, 1.0
        else:
            peak, share = machine.lowered_peak, self.fp4 if precision == "fp4" else self.fp8
        if machine.measured_products is not None:
            return machine.measured_products * peak / machine.peak * share
        return peak * share * self.products * self._power(machine)

    def on(self, machine: Machine) -> Rates:
        """These, where the machine's figures are published; where they were measured they are what is reached."""
        reached = {name: 1.0 for name in ("memory", "link") if name in machine.measured}
        return replace(self, **reached)

    def _power(self, machine: Machine) -> float:
        """Share of the clock that the power allows; published peaks assume the full one."""
        if machine.watts is None:
            return 1.0
        wanted = self.watts_per_tflops * machine.peak / 1e12 / machine.watts
        # Half-way between "all that it wants" and "what it has", smoothly: a step is never bound by one for long.
        return float((1 + wanted**4) ** -0.25)


@dataclass(frozen=True)
class Band:
    """Nine of ten rows that the fit had not seen were inside these factors of their prediction."""

    low: float
    high: float


@cache
def _calibration() -> dict[str, Any]:
    return tomllib.loads(files("zili.planning.fitted").joinpath("calibration.toml").read_text(encoding="utf-8"))


def families() -> tuple[str, ...]:
    """Families of chips with published runs."""
    return tuple(_calibration()["families"])


def rates_of(family: str | None) -> Rates:
    """Efficiencies of a family of chips; of one without published runs, what is common to all families."""
    calibration = _calibration()
    own = calibration["families"].get(family, {})
    return Rates(**{field.name: own.get(field.name, calibration["common"][field.name]) for field in fields(Rates)})


def band_of(run: Run, family: str | None) -> Band:
    """How far a prediction may be off: experts are less certain, chips without published runs least."""
    calibration = _calibration()["bands"]
    kind = "unknown" if family not in families() else "experts" if run.model.mixture else "dense"
    width = calibration[kind]
    return Band(exp(-width), exp(width))
