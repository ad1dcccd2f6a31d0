"""What a backend is: one frozen record, all data, no torch.

The rest of the house never asks which vendor a device is of: it asks a record for a capability, by name.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

from zili.errors import ChipError


class Meaning(NamedTuple):
    """What is behind the name of a capability."""

    promise: str
    """What a yes promises."""
    otherwise: str
    """What a run does without it."""


CAPABILITIES: Mapping[str, Meaning] = {
    "bf16": Meaning("matrix products in bfloat16 at the speed of its matrix units", "runs are in fp32"),
    "bf16_reduce": Meaning("collectives that sum bfloat16", "sums between processes travel in fp32"),
    "fsdp2": Meaning(
        "torch.distributed.fsdp.fully_shard",
        "parallel.shards and context do not cut weights, which stay whole on each process; gradients are summed after "
        "the backward pass",
    ),
    "fused_adamw": Meaning("torch.optim.AdamW(fused=True)", "AdamW updates by its loop of operations"),
    "compile": Meaning("torch.compile with the default compiler", "blocks run eagerly"),
    "deterministic": Meaning(
        "bitwise repeatable steps under torch.use_deterministic_algorithms", "chip.deterministic is refused"
    ),
    "grouped_matmul": Meaning(
        "torch.nn.functional.grouped_mm, forward and backward", "experts are multiplied one after the other"
    ),
    "grouped_heads_attention": Meaning(
        "torch's scaled_dot_product_attention with fewer heads of keys and values than of queries (enable_gqa)",
        "keys and values are repeated for the query heads that share them: heads / kv_heads times their memory",
    ),
    "inf_nan": Meaning(
        "overflow becomes inf or nan", "a loss or gradient norm that is huge, or exactly zero, ends a run as nan would"
    ),
}
"""Every capability that code asks for."""

Evidence = Literal["run", "documented", "assumed", "recipe"]
"""How we know: run by us on that chip; stated in a named public source; concluded, and to be checked; or the user's
word, in the recipe."""


@dataclass(frozen=True, slots=True)
class Capability:
    """One answer, why it is so, and how we know."""

    value: bool
    reason: str
    evidence: Evidence = "assumed"


@dataclass(frozen=True, slots=True)
class RefusedCall:
    """A call that torch takes and the vendor's software is known to turn down: emulated devices do too."""

    operation: str
    """torch's name, whatever the overload: `aten::mm`; of a sum over processes `c10d::NAME`, as in `dist.ReduceOp`."""
    source: str
    """Where it was seen, and on which version."""
    argument: str | None = None
    """Turned down where this one is true; None: whatever the arguments."""
    dtype: str | None = None
    """Turned down for tensors of this one, `bfloat16`; None: of any."""
    capability: str | None = None
    """What code asks for before it makes the call; None: no run makes it."""

    def turns_down(self, operation: str, arguments: Mapping[str, object], dtype: str) -> bool:
        """Whether a call of `operation` with such arguments, on tensors of `dtype`, is refused."""
        given = self.argument is None or bool(arguments.get(self.argument))
        return operation == self.operation and given and self.dtype in (None, dtype)


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable the vendor's software reads."""

    name: str
    value: str | None
    """What we set where the user set nothing. None: never set by us, only shown when the user has set it."""
    reason: str
    only_deterministic: bool = False
    """Set only in deterministic mode, because it costs speed."""
    older_names: tuple[str, ...] = ()
    """A user who set one of these has made the choice already; setting ours would override it."""


@dataclass(frozen=True, slots=True)
class VersionFile:
    """A file in which an installation says what version it is."""

    what: str
    """What the file tells the version of: the driver, the runtime."""
    paths: tuple[str, ...]
    """Globs, variables of the environment in them; the first that is there counts."""
    pattern: str = r"(?im)^version\s*=\s*(\S+)"
    """Regular expression whose first group is the version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """Everything the house knows of one vendor's software. All fields but the first three may stay empty."""

    name: str
    """What `--chip` and `chip.name` take."""
    device_type: str
    """torch's name for the device, e.g. the type in `torch.device(type, index)`."""
    collectives: str
    """Name of the torch.distributed backend."""
    vendor: str = ""
    plugin: str | None = None
    """Module to import after torch so that torch knows the device; None where torch has it built in."""
    plugin_pairs: bool = False
    """The plugin's major.minor version must equal torch's."""
    install: str = ""
    """How a user gets the plugin and what it needs, in one line."""
    torch_build: str | None = None
    """Name in torch/version.py that is None in a torch build without this device."""
    device_nodes: str | None = None
    """Glob of the files the driver makes, one a device; None: nothing is known before activation."""
    runtime_library: str | None = None
    """Shared library that must be found before the plugin can be imported."""
    runtime_fix: str = ""
    """What to do where the runtime library is not found."""
    version_files: tuple[VersionFile, ...] = ()
    """Where driver and runtime say what version they are."""
    visible_devices: str | None = None
    """Variable that limits the devices a process sees; the launcher sets it."""
    environment: tuple[Variable, ...] = ()
    process_setup: Callable[[], str | None] | None = None
    """Run once at activation, for what no variable can set in a process already running; a line says what it did."""
    operations: str | None = None
    """Module with this vendor's fused operations, `VERSIONS` of `zili.ops.versions.Version`."""
    capabilities: Mapping[str, Capability | Callable[[], Capability]] = field(default_factory=dict)
    """The answers by name. A function, called on demand, where the machine must be looked at."""
    refusals: tuple[RefusedCall, ...] = ()
    """What its software is known to turn down."""
    notes: tuple[str, ...] = ()
    vllm_plugin: str | None = None
    """What vLLM needs beside itself to serve on it."""

    def capability(self, name: str, overrides: Mapping[str, Capability] | None = None) -> Capability:
        """The answer to one capability; `overrides` is what the chip model at hand changes.

        Raises:
            ChipError: no capability of that name exists.
        """
        check_capability(name)
        known = (overrides or {}).get(name) or self.capabilities.get(name)
        if known is None:
            return Capability(False, f"the record of {self.name} does not state it")
        return known if isinstance(known, Capability) else known()


def check_capability(name: str) -> None:
    """Raises ChipError where no capability is named so."""
    if name not in CAPABILITIES:
        raise ChipError(f"no capability is named {name!r}{nearest(name, CAPABILITIES)}")


def nearest(wanted: str, known: Iterable[str]) -> str:
    """The end of an error message: what `wanted` is called here, or the names closest to it, or all where they are
    few."""
    known = list(known)
    if said := _typed().get(re.sub(r"[^a-z0-9]", "", wanted.lower())):
        return f"; {said}"
    close = difflib.get_close_matches(wanted.lower(), known, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known)}" if len(known) <= 12 else ""


@cache
def _typed() -> dict[str, str]:
    return tomllib.loads(resources.files("zili.chips").joinpath("typed.toml").read_text(encoding="utf-8"))
