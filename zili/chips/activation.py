"""Opening a backend: environment first, then torch, then the vendor's plugin, then a look at the device."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zili.chips.backend import Backend, Variable
from zili.chips.presence import installed_versions, presence
from zili.errors import ChipError

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)
_ours: dict[str, str] = {}
"""What was set here before: by the process that this one is a fork of, it may be."""
AUTOLOAD = Variable(
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "0",
    "Zili imports the plugin itself: autoloading one whose driver is missing makes `import torch` fail",
)


@dataclass(frozen=True, slots=True)
class SetVariable:
    """One environment variable as it stands after activation."""

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


@dataclass(frozen=True, slots=True)
class Activation:
    """An open backend: what the run header shows."""

    backend: Backend
    device: torch.device
    count: int
    """Devices of this kind in sight."""
    applied: tuple[SetVariable, ...]
    """Set by us."""
    kept: tuple[SetVariable, ...]
    """The user's own values, left as they were."""
    process: str | None
    """What `Backend.process_setup` did."""
    versions: Mapping[str, str]
    warnings: tuple[str, ...]


def activate(backend: Backend, *, index: int = 0, deterministic: bool = False) -> Activation:
    """Set the environment, import torch and the plugin, and make device `index` the current one.

    Call it before anything imports torch: variables that are read at import would otherwise come too late.
    That is not an error, since torch may be there for other reasons; `Activation.warnings` names them. With
    `deterministic`, operations of this process repeat bit by bit from now on, or raise.

    Raises:
        ChipError: the plugin cannot be imported, the device is not there, or another accelerator is in use.
    """
    late, before = _already_imported(backend), {name for name in _ours if _is_ours(name)}
    applied, kept = apply_environment(backend, deterministic)
    warnings = _late_warning(late, tuple(one for one in applied if one.name not in before)) if late else ()
    torch = _import_torch()
    _import_plugin(torch, backend)
    if deterministic:  # before the device is used: torch_npu heeds only the first setting in a thread
        torch.use_deterministic_algorithms(True)
    device, count = _open_device(torch, backend, index)
    for setting in applied:
        _LOG.debug("%s=%s: %s", setting.name, setting.value, setting.reason)
    _LOG.debug("opened %s, one of %d", device, count)
    process = backend.process_setup() if backend.process_setup else None
    return Activation(backend, device, count, applied, kept, process, _versions(backend, torch), warnings)


def apply_environment(
    backend: Backend, deterministic: bool = False
) -> tuple[tuple[SetVariable, ...], tuple[SetVariable, ...]]:
    """Set the default environment where the user set nothing; returns (set by us, the user's own).

    Does not import torch, so a launcher can call it for its children.
    """
    applied, kept = [], []
    for variable in (AUTOLOAD, *backend.environment):
        if _is_ours(variable.name):
            applied.append(SetVariable(variable.name, _ours[variable.name], variable.reason))
            continue
        own = [name for name in (variable.name, *variable.older_names) if name in os.environ]
        if own:
            kept.append(SetVariable(own[0], os.environ[own[0]], variable.reason))
        elif variable.value is not None and (deterministic or not variable.only_deterministic):
            os.environ[variable.name] = _ours[variable.name] = variable.value
            applied.append(SetVariable(variable.name, variable.value, variable.reason))
    return tuple(applied), tuple(kept)


def _is_ours(name: str) -> bool:
    return name in _ours and os.environ.get(name) == _ours[name]


def _already_imported(backend: Backend) -> str | None:
    """The module that read the environment before we came: the plugin where there is one, else torch."""
    module = backend.plugin or "torch"
    return module if module in sys.modules else None


def _late_warning(module: str, applied: tuple[SetVariable, ...]) -> tuple[str, ...]:
    names = [setting.name for setting in applied if setting.name != AUTOLOAD.name]
    if not names:
        return ()
    late = f"{module} was imported before {', '.join(names)} could be set; they may have no effect"
    return (f"{late}: call zili.setup before what imports torch, or set them where the program is started",)


def _import_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except Exception as error:
        raise ChipError(
            f"torch cannot be imported: {error}; reinstall it, and unset {AUTOLOAD.name} if you set it to 1 "
            f"(it is {os.environ.get(AUTOLOAD.name)!r})"
        ) from error


def _import_plugin(torch: Any, backend: Backend) -> None:
    if backend.plugin is None:
        return
    # All plugins share one place in torch, PrivateUse1; the second one would fail with a message about renaming.
    from zili.torch_private import privateuse1_name

    taken = privateuse1_name()
    if taken not in ("privateuseone", backend.device_type):
        raise _occupied(backend, taken)
    try:
        importlib.import_module(backend.plugin)
    except Exception as error:  # a plugin without its driver raises ImportError, OSError or RuntimeError
        found = presence(backend)
        likely = found.reason if not found.here else "its driver or runtime does not fit it"
        fix = found.fix or backend.runtime_fix or backend.install or "see its documentation"
        raise ChipError(
            f"chip {backend.name}: {backend.plugin} cannot be imported ({error}); likely {likely}; {fix}"
        ) from error


def _open_device(torch: Any, backend: Backend, index: int) -> tuple[torch.device, int]:
    if backend.device_type == "cpu":
        return torch.device("cpu"), 1
    holder = torch.accelerator.current_accelerator()
    if holder is not None and holder.type != backend.device_type:
        raise _occupied(backend, holder.type)
    count = torch.accelerator.device_count() if holder is not None else 0
    if count == 0:
        found = presence(backend)
        reason = found.reason if not found.here else "torch sees no device"
        raise ChipError(f"chip {backend.name} is not here: {reason}; {found.fix or backend.install}")
    if not 0 <= index < count:
        error = ChipError(
            f"chip {backend.name}: device {index} asked for, {count} in sight (0..{count - 1}); start fewer "
            f"processes a node or widen {backend.visible_devices}"
        )
        error.alone = True
        raise error
    torch.accelerator.set_device_index(index)
    return torch.device(backend.device_type, index), count


def _occupied(backend: Backend, holder: str) -> ChipError:
    return ChipError(
        f"chip {backend.name} asked for, but torch is bound to {holder} here; a process holds one "
        f"accelerator: use an environment without the other plugin or build of torch"
    )


def _versions(backend: Backend, torch: Any) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if backend.plugin:
        try:
            versions[backend.plugin] = importlib.metadata.version(backend.plugin)
        except importlib.metadata.PackageNotFoundError:
            versions[backend.plugin] = str(getattr(sys.modules[backend.plugin], "__version__", "unknown"))
    return versions | installed_versions(backend)
