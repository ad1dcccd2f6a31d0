"""What the model of time knows of a chip: its catalog figures, or what `zili doctor` measured, in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zili.chips.catalog import Chip
from zili.errors import ChipError, ConfigError
from zili.planning.run import Precision

# Where the catalog has no figure, what is usual among the chips that have one.
_FLOPS_A_BYTE = 250
_LINK_SHARE = 0.25
_NETWORK_GBIT_S = 200.0
_CHIPS_PER_NODE = 8


@dataclass(frozen=True)
class Machine:
    """A chip and its way to its neighbours."""

    peak: float
    """FLOPs a second of bf16 products."""
    lowered_peak: float
    """The same in the precision that is trained in."""
    memory: float
    """Bytes a second."""
    link: float
    """Bytes a second to other chips of a domain, one direction."""
    domain: int
    """Chips that reach one another so."""
    network: float
    """Bytes a second out of it, one direction, for one chip."""
    watts: float | None = None
    capacity: float | None = None
    """Bytes of memory."""
    measured_products: float | None = None
    """FLOPs a second of the fastest bf16 product, where it was measured."""
    measured: frozenset[str] = frozenset()
    """Fields that are what was reached, not what is published: no efficiency comes on top."""
    assumed: tuple[str, ...] = ()
    """Figures that are neither published nor given, and what stands in for them."""


def machine(
    chip: Chip, precision: Precision = "bf16", *, peak_tflops: float | None = None, network_gbit_s: float | None = None
) -> Machine:
    """The machine of a chip; `peak_tflops` (of bf16) and `network_gbit_s` stand in for the catalog's.

    Raises:
        ChipError: the peak is neither published nor given. It is never guessed.
    """
    peak = peak_tflops or chip.bf16_tflops or chip.fp16_tflops
    if peak is None:
        raise ChipError(
            f"the peak of {chip.name} is not published: give it with --peak-tflops, or what `zili doctor --json` "
            "measured on one with --doctor"
        )
    special = {"fp8": chip.fp8_tflops, "fp4": chip.fp4_tflops, "int8": chip.int8_tops}.get(precision)
    assumed = []

    def known(value: float | None, name: str, otherwise: float) -> float:
        if value is None:
            assumed.append(f"{name} {otherwise:g}")
        return value or otherwise

    memory = known(chip.memory_gb_s, "memory_gb_s", round(peak * 1000 / _FLOPS_A_BYTE))
    return Machine(
        peak=peak * 1e12,
        lowered_peak=(special or peak) * 1e12,
        memory=memory * 1e9,
        link=known(chip.link_gb_s, "link_gb_s", round(_LINK_SHARE * memory)) / 2 * 1e9,
        domain=int(known(chip.link_domain or chip.chips_per_node, "chips_per_node", _CHIPS_PER_NODE)),
        network=known(network_gbit_s or chip.internode_gbit_s, "internode_gbit_s", _NETWORK_GBIT_S) / 8 * 1e9,
        watts=chip.watts,
        capacity=chip.memory_gb * 1e9 if chip.memory_gb else None,
        assumed=tuple(assumed),
    )


def with_measurements(machine: Machine, report: Mapping[str, Any]) -> tuple[Machine, list[str]]:
    """A machine with what a report of `zili doctor --json` measured in place of published figures, and what that was.

    Raises:
        ConfigError: the report has no measurements.
    """
    findings = report.get("findings")
    figures = {}
    for finding in findings if isinstance(findings, list) else ():
        if isinstance(finding, Mapping) and isinstance(finding.get("figures"), Mapping):
            figures[str(finding.get("name"))] = dict(_speeds(finding["figures"]))
    found: dict[str, Any] = {}
    products = [value for key, value in figures.get("matmul bf16", {}).items() if key.split()[0].isdigit()]
    if products:
        found["measured_products"] = max(products)
    if "bytes/s" in figures.get("memory", {}):
        found["memory"] = figures["memory"]["bytes/s"]
    gathers = {name: values for name, values in figures.items() if name.startswith("all_gather among")}
    if gathers:
        # Among the most: inside the node as a whole.
        most = max(gathers, key=lambda name: int(name.split()[-1]) if name.split()[-1].isdigit() else 0)
        found["link"] = gathers[most].get("bytes/s", machine.link)
    if not found:
        raise ConfigError("this is not a report of `zili doctor --json`: it has no measured speeds")
    units = {"measured_products": ("TFLOP/s in bf16 products", 1e12), "memory": ("GB/s of memory", 1e9)}
    units["link"] = ("GB/s between chips", 1e9)
    said = [f"{value / units[name][1]:.4g} {units[name][0]}" for name, value in found.items()]
    return replace(machine, measured=frozenset(found), **found), said


def _speeds(figures: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    """What is a positive finite number."""
    for key, value in figures.items():
        if isinstance(key, str) and key and isinstance(value, int | float) and 0 < value < float("inf"):
            yield key, float(value)
