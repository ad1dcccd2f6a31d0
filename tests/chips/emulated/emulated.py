"""The emulated device in Python: building it, registering it under a vendor's name, and reading what it counted.

A process has one of them. It comes the way a vendor's does: Zili imports a plugin, which calls `register`; `plugins.py`
makes such plugins.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

LIBRARY = "EMULATED_LIBRARY"
"""Variable with the path of the built library."""
FAULTS = "EMULATED_FAULTS"
"""Variable with faults to plant at the start: a JSON list of arguments of `Fault`, with "rank" where it is that of one
process."""
_SOURCES = ("device.cpp", "collectives.cpp")
_MODULE = "emulated_device"


class Fault(NamedTuple):
    """What an operation or collective does wrong in its calls `first` up to `last`, counted from 0."""

    operation: str
    """`aten::mm`, whatever its overload; or `all_reduce` and the like."""
    kind: str
    """`scale` (times 1 + amount), `round` (cuts mantissas to `amount` bits), `saturate` (inf is the largest number and
    nan zero), `raise`; of collectives `drop`, `slow` (by `amount` seconds), `die`."""
    amount: float = 0.0
    first: int = 0
    last: int = 1 << 62


class Counts(NamedTuple):
    """What the device did since `reset`."""

    waits: int
    """Values and copies that the host asked for."""
    live: int
    """Bytes allocated now."""
    peak: int


def build(folder: Path) -> Path:
    """The library of these sources, built into `folder` unless it is there.

    Built aside and renamed: torch's own build folder keeps the lock of a build that was killed, and the next would wait
    for it forever.

    Raises:
        RuntimeError: it cannot be built; the message says what is missing.
    """
    from torch.utils import cpp_extension

    sources = [Path(__file__).parent / name for name in (*_SOURCES, "device.h")]
    text = b"".join(source.read_bytes() for source in sources)
    target = folder / f"{_MODULE}-{hashlib.sha256(text + torch.__version__.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            cpp_extension.verify_ninja_availability()
            cpp_extension.get_compiler_abi_compatibility_and_version(cpp_extension.get_cxx_compiler())
            cpp_extension.load(
                _MODULE,
                [str(source) for source in sources if source.suffix == ".cpp"],
                extra_cflags=["-O1", "-DUSE_DISTRIBUTED", "-DUSE_C10D"],
                build_directory=aside,
                is_python_module=False,
            )
            (Path(aside) / f"{_MODULE}.so").replace(target)
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"the emulated device cannot be built: {error}; install a C++ compiler (Debian: apt install g++) and ninja "
            "(pip install ninja)"
        ) from error
    return target


def register(device_type: str, collectives: str, name: str, devices: int = 8, memory: int = 8 << 30) -> None:
    """Make this process's accelerator: `device_type` to torch, `collectives` to torch.distributed.

    Args:
        name: model, as a driver reports it.
        devices: how many are in sight.
        memory: bytes of each.
    """
    library = _library()
    library.start(devices, memory)
    torch.utils.rename_privateuse1_backend(device_type)
    module = _device_module(device_type, name, devices)
    torch._register_device_module(device_type, module)
    sys.modules[f"torch.{device_type}"] = module
    torch.utils.generate_methods_for_privateuse1_backend(for_packed_sequence=False)

    def over_gloo(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return library.collectives(dist.ProcessGroupGloo(store, rank, size, timeout), collectives)

    dist.Backend.register_backend(collectives, over_gloo, devices=[device_type])
    _plant_from_environment()


def plant(*faults: Fault) -> None:
    """Plant these faults and no others; calls are counted from here."""
    _library().plant([tuple(fault) for fault in faults])


def counts() -> Counts:
    """What the device did since the start or the last `reset`."""
    return Counts(*_library().counts())


def reset() -> None:
    """Count from here."""
    _library().reset()


def refuse(refusals: Iterable[Any]) -> None:
    """Turn down what a vendor is known to (`zili.chips.RefusedCall`), as its software does: with a TypeError.

    What is said of sums over processes is left to Gloo, behind all of these names, which turns the same down.
    """
    global _registered  # noqa: PLW0603
    _registered = torch.library.Library("aten", "IMPL")
    for operation in {one.operation for one in refusals if one.operation.startswith("aten::")}:
        those = [one for one in refusals if one.operation == operation]
        packet = getattr(torch.ops.aten, operation.removeprefix("aten::"))
        for overload in (getattr(packet, name) for name in packet.overloads()):
            _turn_down(_registered, operation, overload, those)


_registered: Any = None
"""Kernels last as long as what registered them."""


def _turn_down(registered: torch.library.Library, operation: str, overload: Any, refusals: list[Any]) -> None:
    keys = torch._C.DispatchKey
    composed = [key for key in _COMPOSED if torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key)]
    if not composed:  # `.out` and the like
        return
    own = getattr(keys, composed[0])
    names = [argument.name for argument in overload._schema.arguments]

    def kernel(*arguments: Any, **named: Any) -> Any:
        given = dict(zip(names, arguments, strict=False)) | named
        dtype = next(str(one.dtype) for one in given.values() if isinstance(one, torch.Tensor))
        for refusal in refusals:
            if refusal.turns_down(operation, given, dtype.removeprefix("torch.")):
                what = f"argument {refusal.argument}" if refusal.argument else dtype
                raise TypeError(f"{operation} on this device takes no {what}")
        return overload._op_dk(own, *arguments, **named)

    # What is composed of other operations is so above autograd, or below it.
    above = composed[0] == "CompositeImplicitAutograd"
    for key in ("AutogradPrivateUse1", "PrivateUse1") if above else ("PrivateUse1",):
        registered.impl(overload, kernel, key)


_COMPOSED = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


def _library() -> Any:
    if _MODULE not in sys.modules:
        spec = importlib.util.spec_from_file_location(_MODULE, os.environ[LIBRARY])
        assert spec is not None and spec.loader is not None
        sys.modules[_MODULE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_MODULE])
    return sys.modules[_MODULE]


def _plant_from_environment() -> None:
    faults = json.loads(os.environ.get(FAULTS, "[]"))
    rank = int(os.environ.get("RANK", "0"))
    plant(*(Fault(**fault) for fault in faults if fault.pop("rank", rank) == rank))


def _device_module(device_type: str, name: str, devices: int) -> types.ModuleType:
    """What `torch.get_device_module` gives: the interface that all vendors' modules mirror, as far as torch asks."""
    library = _library()
    module = types.ModuleType(f"torch.{device_type}")

    def here() -> torch.device:
        return torch.device(device_type, library.current_device())

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **rest: Any) -> Any:
            return super().__new__(cls, device=here(), priority=priority)

    class Event(torch.Event):  # FSDP2 hands it to torch.Stream, which takes no other class
        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
            return super().__new__(cls, device=here(), enable_timing=enable_timing)

    def set_device(device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        if index is not None:
            library.set_current_device(index)

    @contextlib.contextmanager
    def device(wanted: Any) -> Iterator[None]:
        before = library.current_device()
        set_device(wanted)
        try:
            yield
        finally:
            library.set_current_device(before)

    @contextlib.contextmanager
    def stream(wanted: Any) -> Iterator[Any]:
        yield wanted

    functions: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: devices > 0,
        "device_count": lambda: devices,
        "current_device": library.current_device,
        "set_device": set_device,
        "device": device,
        "stream": stream,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "set_stream": lambda stream: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: name,
        "memory_allocated": lambda device=None: counts().live,
        "max_memory_allocated": lambda device=None: counts().peak,
        # Operations draw from the CPU's generator, whose kernels they are.
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        # What torch_mlu says of every chip; nothing may depend on it.
        "get_device_capability": lambda device=None: (5, 0),
        "is_bf16_supported": lambda: True,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }
    for key, function in functions.items():
        setattr(module, key, function)
    return module


if __name__ == "__main__":  # loading it makes the process one with a device: other processes build by this
    print(build(Path(sys.argv[1])))
