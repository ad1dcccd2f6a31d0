"""Which version of each operation runs: chosen once, at start, each choice with its reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from zili.errors import ChipError, ConfigError
from zili.ops import grouped_heads, product
from zili.ops.blocked_attention import blocked_attention
from zili.ops.chunked_cross_entropy import chunked_linear_cross_entropy
from zili.ops.examples import Example, example, examples, run
from zili.ops.timings import Timings, fastest_in_turns
from zili.ops.versions import Version
from zili.ops.yardstick import compared, first_line

REFERENCE = "reference"
_MARGIN = 1.02
"""A faster version must be this much faster, so that noise does not choose."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _on_cpu_fp32(device_type: str, precision: str) -> str | None:
    if (device_type, precision) != ("cpu", "fp32"):
        return "only on cpu in fp32"
    return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"


def _anywhere(device_type: str, precision: str) -> str | None:
    return None


VERSIONS = (
    Version("linear", "onednn", product.linear, _on_cpu_fp32),
    Version("attention", "blocked", blocked_attention, _on_cpu_fp32),
    Version("grouped_matmul", "grouped", product.grouped, _anywhere, needs="grouped_matmul"),
    Version(
        "linear_cross_entropy",
        "chunked",
        chunked_linear_cross_entropy,
        _anywhere,
        reason="logits are never whole in memory",
    ),
)
OPERATIONS: dict[str, Callable[..., Any]] = {}
"""The reference of every operation, by name, in the order in which `zili.ops` declares them."""
OF_EXPERTS = ("grouped_matmul", "permute", "unpermute")
"""Operations that only a mixture of experts needs."""
_active: dict[str, Callable[..., Any]] = {}
_names: dict[str, str] = {}
Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


def operation(reference: Callable[Inputs, Output]) -> Callable[Inputs, Output]:
    """The operation that `reference` declares: its signature and its words, and the version that is chosen for it."""
    name = reference.__name__
    OPERATIONS[name] = _active[name] = reference
    _names[name] = REFERENCE

    @wraps(reference)
    def run_chosen(*arguments: Inputs.args, **keywords: Inputs.kwargs) -> Output:
        return _active[name](*arguments, **keywords)

    return run_chosen


def active(operation: str) -> Callable[..., Any]:
    """The function that runs for `operation` now."""
    return _active[operation]


@contextmanager
def replaced(replace: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """For a while each operation that runs is `replace(name, version)`: how a diagnosis watches them."""
    before = dict(_active)
    _active.update({name: replace(name, version) for name, version in before.items()})
    try:
        yield
    finally:
        _active.update(before)


def chosen() -> dict[str, str]:
    """Name of the running version of every operation."""
    return dict(_names)


def versions(vendor: str | None = None) -> tuple[Version, ...]:
    """All versions but the references, in the order in which they are tried: those of the module `vendor` first.

    Raises:
        ChipError: the module cannot be imported.
    """
    if vendor is None:
        return VERSIONS
    try:
        return (*importlib.import_module(vendor).VERSIONS, *VERSIONS)
    except Exception as error:  # a third party's module may raise anything
        raise ChipError(
            f"the operations of this chip, {vendor}, cannot be imported: {error}; repair its package"
        ) from error


def choose(
    device_type: str,
    precision: str,
    asked: Mapping[str, str],
    unused: Collection[str] = (),
    vendor: str | None = None,
    lacking: Mapping[str, str] | None = None,
    timings: Timings | None = None,
) -> list[tuple[str, str, str]]:
    """Set every operation's version; returns (operation, version, reason) of each that has more than one.

    Args:
        device_type: torch's device type.
        precision: "fp32" or "bf16".
        asked: version by operation, as the recipe or a resumed checkpoint names it.
        unused: operations that the model does not need: no choice of theirs is of interest.
        vendor: module with the versions of the chip's vendor (`Backend.operations`).
        lacking: what versions may need and is not there, with the reason (`Device.lacking`); None: not known.
        timings: what was measured in earlier runs, and takes what is measured now.
    Raises:
        ConfigError: an operation or version of that name does not exist, or it cannot run here.
        ChipError: the vendor's module cannot be imported, or a version that was asked for differs from the reference.
    """
    known = versions(vendor)
    _check_names(asked, known)
    grouped_heads.decide(device_type, lacking)
    choices = []
    _active.update(OPERATIONS)  # nothing of an earlier choice stays
    _names.update(dict.fromkeys(OPERATIONS, REFERENCE))
    for operation in OPERATIONS:
        candidates = [version for version in known if version.operation == operation]
        if operation in asked:
            name, function, reason = _asked_for(
                candidates, asked[operation], operation, device_type, precision, timings
            )
        elif candidates and operation not in unused:
            name, function, reason = _best(candidates, operation, device_type, precision, lacking or {}, timings)
        else:
            continue
        _active[operation], _names[operation] = function, name
        if operation == "linear":  # first of all: the others build on its product
            product.use_library("plain" if name == REFERENCE else name)
        choices.append((operation, name, reason))
    return choices


def runs_on(operation: str, name: str, device_type: str, precision: str, vendor: str | None = None) -> bool:
    """Whether `operation` has a version of that name other than the reference, and it runs there."""
    return any(
        version.operation == operation and version.name == name and version.lacks(device_type, precision) is None
        for version in versions(vendor)
    )


Selected = tuple[str, Callable[..., Any], str]


def _asked_for(
    candidates: list[Version],
    name: str,
    operation: str,
    device_type: str,
    precision: str,
    timings: Timings | None,
) -> Selected:
    version = next((version for version in candidates if version.name == name), None)
    if version is None:
        return REFERENCE, OPERATIONS[operation], "asked for"
    missing = version.lacks(device_type, precision)
    if missing:
        raise ConfigError(
            f"chip.operations.{operation}: {name!r} does not run on {device_type} in {precision}: {missing}"
        )
    known_to_agree = timings is not None and timings.agreed(f"{operation} {name}")
    if not known_to_agree and (problem := _differs(OPERATIONS[operation], version, device_type, precision)):
        raise ChipError(
            f"chip.operations.{operation}: {name!r} {problem}; "
            f'`zili doctor --only numbers` says more; to train without it, set it to "{REFERENCE}"'
        )
    if timings is not None:
        timings.agrees(f"{operation} {name}")
    return name, version.function, "asked for"


def _best(
    candidates: list[Version],
    operation: str,
    device_type: str,
    precision: str,
    lacking: Mapping[str, str],
    timings: Timings | None,
) -> Selected:
    """The first version that runs, agrees with the reference and is faster; else the reference, and why."""
    plain, refused = OPERATIONS[operation], []
    for version in candidates:
        problem = version.lacks(device_type, precision) or lacking.get(version.needs)
        problem = problem or _differs(plain, version, device_type, precision)
        if problem is None and version.reason:
            return version.name, version.function, version.reason
        if problem is None:
            ratio = _ratio(plain, version, device_type, precision, timings)
            if ratio >= _MARGIN:
                return version.name, version.function, f"{ratio:.1f}x the reference's speed on this machine"
            problem = f"ran at {ratio:.2f}x its speed on this machine"
        refused.append(f"{version.name}: {problem}")
    return REFERENCE, plain, "; ".join(refused)


def _differs(plain: Callable[..., Any], version: Version, device_type: str, precision: str) -> str | None:
    """How `version` differs from the reference by more than rounding; None where it does not."""
    dtype = _DTYPES[precision]
    # As runs call it: on weights gathered in bf16, and under autocast on weights and a residual stream in fp32.
    for given in {dtype, torch.float32}:
        cases = examples(version.operation, given)
        try:
            with _lowered(device_type, dtype):
                found = [way for case in cases for way in compared(version.function, plain, *case, device_type).items()]
        except Exception as problem:  # a vendor's kernel may raise anything
            return f"failed ({first_line(problem)})"
        for way, measured in found:
            if not measured.fits:
                return f"differs from the reference: {way} is {measured}"
    return None


def _ratio(
    plain: Callable[..., Any], version: Version, device_type: str, precision: str, timings: Timings | None
) -> float:
    """Speed of `version` over the reference's, now or as it was measured before."""
    inputs = example(version.operation, device_type, _DTYPES[precision])

    def measure() -> float:
        return _speed_ratio(plain, version.function, inputs)

    return measure() if timings is None else timings.measured(_named(version, inputs), measure)


def _named(version: Version, inputs: Example) -> str:
    """What is measured, for who keeps the figure: a version, and the shapes it is timed on."""
    shapes = [list(value.shape) for value in inputs.arguments if isinstance(value, torch.Tensor)]
    return f"{version.operation} {version.name} {shapes}"


@contextmanager
def _lowered(device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """The chip's autocast to `dtype` and the CPU's, none for fp32."""
    half = dtype != torch.float32
    with torch.autocast(device_type, dtype, enabled=half), torch.autocast("cpu", dtype, enabled=half):
        yield


def _speed_ratio(plain: Callable[..., Any], faster: Callable[..., Any], inputs: Example) -> float:
    """Speed of `faster` over `plain`, forward and backward."""
    ways = [partial(run, function, inputs) for function in (plain, faster)]
    slow, fast = fastest_in_turns(ways, on_host=inputs.arguments[0].device.type == "cpu")
    return slow / fast


def _check_names(asked: Mapping[str, str], known: tuple[Version, ...]) -> None:
    for operation, name in asked.items():
        if operation not in OPERATIONS:
            raise ConfigError(f"chip.operations: no operation {operation!r}; there are {', '.join(OPERATIONS)}")
        names = [REFERENCE, *(version.name for version in known if version.operation == operation)]
        if name not in names:
            raise ConfigError(f"chip.operations.{operation}: no version {name!r}; there are {', '.join(names)}")
