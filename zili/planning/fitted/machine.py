"""A chip as the model of time sees it: figures of the catalog, or those that `zili doctor` measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from zili.chips import find_backend
from zili.chips.catalog import Chip, identify
from zili.errors import ChipError, ConfigError
from zili.planning.exact.memory import usable
from zili.planning.run import Precision

# Where the catalog has no figure, what is usual among the chips that have one.
_FLOPS_A_BYTE = 250
_LINK_SHARE = 0.25
_NETWORK_GBIT_S = 200.0
_CHIPS_PER_NODE = 8
_LEAST_REACHED = 1e-3
"""Share of the published figure; a smaller measurement is one of something else."""
_ROUNDING = 1 + 1e-9
_FASTEST = 1e18
"""Most that a chip may do, in FLOP/s or bytes/s, where no figure is published to compare with."""


@dataclass(frozen=True)
class Machine:
    """A chip and its way to its neighbours."""

    name: str
    """The chip's in the catalog."""
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
    grouped_heads: bool = True
    """Whether attention takes fewer heads of keys and values than of queries; else they are repeated first."""
    measured_products: float | None = None
    """FLOPs a second of the fastest bf16 product, where it was measured."""
    measured: frozenset[str] = frozenset()
    """Fields that are what was reached, not what is published: no efficiency comes on top."""
    assumed: Mapping[str, float] = field(default_factory=dict)
    """Figures that are neither published nor given, by their names in the catalog, and what stands in for them."""

    @property
    def room(self) -> float:
        """Bytes of memory that a run can have; without end where the chip's is not published."""
        return inf if self.capacity is None else usable(self.capacity)

    def published(self, figure: str, value: float) -> float | None:
        """The value of a capability that is not only assumed."""
        return None if figure in self.assumed else value


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
    assumed: dict[str, float] = {}

    def known(value: float | None, name: str, otherwise: float) -> float:
        if value is None:
            assumed[name] = otherwise
        return value or otherwise

    memory = known(chip.memory_gb_s, "memory_gb_s", _rounded(peak * 1000 / _FLOPS_A_BYTE))
    return Machine(
        name=chip.name,
        peak=peak * 1e12,
        lowered_peak=(special or peak) * 1e12,
        memory=memory * 1e9,
        link=known(chip.link_gb_s, "link_gb_s", _rounded(_LINK_SHARE * memory)) / 2 * 1e9,
        domain=int(known(chip.link_domain or chip.chips_per_node, "chips_per_node", _CHIPS_PER_NODE)),
        network=known(network_gbit_s or chip.internode_gbit_s, "internode_gbit_s", _NETWORK_GBIT_S) / 8 * 1e9,
        watts=chip.watts,
        capacity=chip.memory_gb * 1e9 if chip.memory_gb else None,
        grouped_heads=_takes_grouped_heads(chip),
        assumed=assumed,
    )


def _takes_grouped_heads(chip: Chip) -> bool:
    """By the records; of a chip that no backend drives nothing else is known than what torch has."""
    if chip.backend is None:
        return True
    return find_backend(chip.backend).capability("grouped_heads_attention", chip.overrides()).value


def _rounded(value: float) -> float:
    """To three digits: a guess has no more. Never to zero."""
    return float(f"{value:.3g}")


def share_sent(collective: str, processes: float) -> float:
    """What each of `processes` sends, over the larger of its input and its output.

    This is what makes speeds of collectives comparable: a collective's rate, in `zili doctor` and in `Machine.link`, is
    the bytes that a process has to send, over the time. That is what its link carries in one direction, if the
    collective moves no byte that it need not. Such a collective goes round a ring; an exchange or a message goes the
    direct way (Thakur, Rabenseifner and Gropp 2005; "bus bandwidth" of nccl-tests' PERFORMANCE.md).
    """
    if collective in ("broadcast", "send and receive"):
        return 1.0
    # A sum on every process is scattered, then gathered.
    return (2 if collective == "all_reduce" else 1) * (processes - 1) / processes


def with_measurements(machine: Machine, report: Mapping[str, Any]) -> tuple[Machine, list[str]]:
    """A machine with what a report of `zili doctor --json` measured in place of published figures, and what that was.

    Raises:
        ConfigError: the report is of another chip or of none, has no measurements, or has one that the chip cannot
            reach or that is a thousandth of what is published.
    """
    _check_chip(machine, report)
    figures = _figures(report)
    found: dict[str, float] = {}
    said = []

    def take(name: str, value: float | None, published: float | None, unit: float, what: str) -> None:
        if value is None:
            return
        text = f"{value / unit:.4g} {what}"
        if published is not None and not _LEAST_REACHED * published <= value <= published * _ROUNDING:
            raise ConfigError(
                f"the report has {text}, and {machine.name} is said to have {published / unit:.4g}: no measurement of "
                "it; run `zili doctor --json` again, with nothing else on the chip"
            )
        found[name] = value
        said.append(text)

    take("measured_products", fastest_product(report), machine.peak, 1e12, "TFLOP/s in bf16 products")
    take("memory", _speed(figures, "memory"), machine.published("memory_gb_s", machine.memory), 1e9, "GB/s of memory")
    # Among the most: inside the node as a whole.
    most = max(
        (int(name.split()[-1]) for name in figures if re.fullmatch(r"all_gather among \d{1,6}", name)), default=0
    )
    rate, link = _speed(figures, f"all_gather among {most}"), machine.published("link_gb_s", machine.link)
    take("link", rate, link, 1e9, f"GB/s between {most} chips")
    if not found:
        raise ConfigError("this is not a report of `zili doctor --json`: it has no measured speeds")
    return replace(machine, measured=frozenset(found), **found), said  # type: ignore[arg-type]


def fastest_product(report: Mapping[str, Any]) -> float | None:
    """FLOP/s of the fastest bf16 product that a report of `zili doctor --json` has.

    Raises:
        ConfigError: one is no speed, or not by size.
    """
    rates = {key: rate for key, rate in _figures(report).get("matmul bf16", {}).items() if key != "peak FLOP/s"}
    if other := [key for key in rates if not re.fullmatch(r"\d+ FLOP/s", key)]:
        raise ConfigError(f"the report's matmul bf16 has {other[0]!r}, where zili doctor gives FLOP/s by size")
    return max((_number("matmul bf16", key, rate) for key, rate in rates.items()), default=None)


def _check_chip(machine: Machine, report: Mapping[str, Any]) -> None:
    """A speed without the chip that has it says nothing."""
    device = report.get("model") or report.get("device")
    if not isinstance(device, str):
        raise ConfigError("this is not a report of `zili doctor --json`: it does not say on which chip it was made")
    chip = identify(device)
    if chip is None or chip.name != machine.name:
        of = device if chip is None else f"{device} ({chip.name})"
        raise ConfigError(f"the report is of {of}, and the plan is for {machine.name}: measure on the chip itself")


def _figures(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of each finding that has some, by name."""
    return dict(_findings(report.get("findings")))


def _findings(findings: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for finding in findings if isinstance(findings, list) else ():
        if isinstance(finding, Mapping) and isinstance(finding.get("figures"), Mapping):
            yield str(finding.get("name")), finding["figures"]


def _speed(figures: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    return _number(name, "bytes/s", figures[name]["bytes/s"]) if "bytes/s" in figures.get(name, {}) else None


def _number(finding: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _FASTEST:
        raise ConfigError(f"the report's {finding}, {key}, is {str(value)[:40]}: no speed")
    return float(value)
