"""Which version of each operation runs: chosen once, at start, each choice with its reason."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zili.errors import ConfigError
from zili.ops import product, reference
from zili.ops.blocked_attention import blocked_attention
from zili.ops.chunked_cross_entropy import chunked_linear_cross_entropy

REFERENCE = "reference"
_MARGIN = 1.02
"""A faster version must be this much faster, so that noise does not choose."""
_ROUNDS = 9


@dataclass(frozen=True)
class Version:
    """A faster form of one operation."""

    operation: str
    name: str
    function: Callable[..., Tensor]
    fits: Callable[[str, str], bool]
    """Device type and precision to whether it may run there."""
    example: Callable[[], tuple[Tensor, ...]] | None = None
    """Inputs to time it on against the reference; None: taken wherever it fits, `reason` says why."""
    reason: str = ""


def _on_cpu_fp32(device_type: str, precision: str) -> bool:
    return device_type == "cpu" and precision == "fp32" and torch.backends.mkldnn.is_available()


def _linear_example() -> tuple[Tensor, ...]:
    return torch.randn(2048, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)


def _attention_example() -> tuple[Tensor, ...]:
    heads = [torch.randn(2, 512, count, 64, requires_grad=True) for count in (6, 2, 2)]
    return tuple(heads)


def _has_grouped(device_type: str, precision: str) -> bool:
    return hasattr(torch.nn.functional, "grouped_mm")


def _grouped_example() -> tuple[Tensor, ...]:
    ends = torch.arange(64, 513, 64, dtype=torch.int32)
    return torch.randn(512, 256, requires_grad=True), torch.randn(8, 128, 256, requires_grad=True), ends


VERSIONS = (
    Version("linear", "onednn", product.linear, _on_cpu_fp32, _linear_example),
    Version("attention", "blocked", blocked_attention, _on_cpu_fp32, _attention_example),
    Version("grouped_matmul", "grouped", product.grouped, _has_grouped, _grouped_example),
    Version(
        "linear_cross_entropy",
        "chunked",
        chunked_linear_cross_entropy,
        lambda device_type, precision: True,
        reason="logits are never whole in memory",
    ),
)
_REFERENCES: Mapping[str, Callable[..., Tensor]] = {
    name: getattr(reference, name)
    for name in (
        *("linear", "rms_norm", "rotate", "swiglu", "attention", "grouped_matmul"),
        "linear_cross_entropy",
    )
}
_active: dict[str, Callable[..., Tensor]] = dict(_REFERENCES)
_names: dict[str, str] = dict.fromkeys(_REFERENCES, REFERENCE)


def active(operation: str) -> Callable[..., Tensor]:
    """The function that runs for `operation` now."""
    return _active[operation]


def chosen() -> dict[str, str]:
    """Name of the running version of every operation."""
    return dict(_names)


def choose(
    device_type: str, precision: str, asked: Mapping[str, str], unused: Collection[str] = ()
) -> list[tuple[str, str, str]]:
    """Set every operation's version; returns (operation, version, reason) of each that has more than one.

    Args:
        device_type: torch's device type.
        precision: "fp32" or "bf16".
        asked: version by operation, as the recipe or a resumed checkpoint names it.
        unused: operations that the model does not need: no choice of theirs is of interest.
    Raises:
        ConfigError: an operation or version of that name does not exist, or it cannot run here.
    """
    _check_names(asked)
    choices = []
    where = (device_type, precision)
    for operation in _REFERENCES:
        version = next((version for version in VERSIONS if version.operation == operation), None)
        if operation in asked:
            name, function, reason = _asked_for(version, asked[operation], operation, where)
        elif version is not None and operation not in unused:
            name, function, reason = _best(version, where)
        else:
            continue
        _active[operation], _names[operation] = function, name
        if operation == "linear":  # first of all: the others build on its product
            product.use_library("plain" if name == REFERENCE else name)
        choices.append((operation, name, reason))
    return choices


def runs_on(operation: str, name: str, device_type: str, precision: str) -> bool:
    """Whether `operation` has a version of that name other than the reference, and it runs there."""
    return any(
        version.operation == operation and version.name == name and version.fits(device_type, precision)
        for version in VERSIONS
    )


Selected = tuple[str, Callable[..., Tensor], str]


def _asked_for(version: Version | None, name: str, operation: str, where: tuple[str, str]) -> Selected:
    if name == REFERENCE or version is None:
        return REFERENCE, _REFERENCES[operation], "asked for"
    if not version.fits(*where):
        raise ConfigError(f"chip.operations.{operation}: {name!r} does not run on {where[0]} in {where[1]}")
    return name, version.function, "asked for"


def _best(version: Version, where: tuple[str, str]) -> Selected:
    """The faster version where it fits and is faster; else the reference."""
    plain = _REFERENCES[version.operation]
    if not version.fits(*where):
        return REFERENCE, plain, f"{version.name} does not run on {where[0]} in {where[1]}"
    if version.example is None:
        return version.name, version.function, version.reason
    ratio = _speed_ratio(plain, version.function, version.example())
    if ratio < _MARGIN:
        return REFERENCE, plain, f"{version.name} ran at {ratio:.2f}x its speed on this machine"
    return version.name, version.function, f"{ratio:.1f}x the reference's speed on this machine"


def _speed_ratio(plain: Callable[..., Tensor], faster: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    """Speed of `faster` over `plain`, forward and backward: best of a few, in turns, after one round to warm up."""
    best = [math.inf, math.inf]
    for turn in range(_ROUNDS + 1):
        for i, function in enumerate((plain, faster)):
            started = time.perf_counter()
            out = function(*inputs)
            out.backward(torch.ones_like(out))
            if turn:
                best[i] = min(best[i], time.perf_counter() - started)
    return best[0] / best[1]


def _check_names(asked: Mapping[str, str]) -> None:
    for operation, name in asked.items():
        if operation not in _REFERENCES:
            raise ConfigError(f"chip.operations: no operation {operation!r}; there are {', '.join(_REFERENCES)}")
        names = [REFERENCE, *(version.name for version in VERSIONS if version.operation == operation)]
        if name not in names:
            raise ConfigError(f"chip.operations.{operation}: no version {name!r}; there are {', '.join(names)}")
