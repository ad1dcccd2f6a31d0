"""The CPU: always here, and the reference every other chip is compared with."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
from pathlib import Path

from zili.chips.backend import Backend, Capability, Variable

_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
"""Matrix or dot-product units: Intel AMX, AVX-512 BF16 (AMD Zen 4 on, some Intel), Arm's BF16 extension."""


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first processor as Linux names them; empty where there is no /proc."""
    return frozenset(_cpuinfo("flags", "Features").split())


def cpu_name() -> str:
    """Model name for people, e.g. "AMD EPYC 9654"."""
    return _cpuinfo("model name", "CPU part") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def bf16_units() -> Capability:
    """Without bf16 units a bf16 product runs at about a quarter of fp32's speed: say no then."""
    flags = cpu_flags()
    if not flags:
        return Capability(False, f"CPU flags cannot be read on {platform.system()}; fp32 is the safe choice")
    found = [flag for flag in _BF16_FLAGS if flag in flags]
    if found:
        return Capability(True, f"the CPU has bf16 units ({found[0]})", "run")
    return Capability(False, "the CPU has no bf16 units: bf16 runs at about a quarter of fp32", "run")


def compiler_command() -> str:
    """The C++ compiler, as torch.compile looks for it: CXX, then the system's."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def compiler() -> Capability:
    """torch.compile writes C++ for the CPU."""
    command = compiler_command()
    found = shutil.which(command)
    if found:
        return Capability(True, f"C++ compiler {found}", "run")
    return Capability(False, f"no C++ compiler: {command} is not on PATH (install it, or set CXX)", "run")


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>
_KEPT_BLOCK = 32 * 2**20  # the largest threshold glibc takes on 64-bit systems


def keep_freed_memory() -> str | None:
    """Make glibc's malloc keep what is freed, so that a step does not fault in its activations again.

    By default every block over 128 KB, which is every activation, is mapped fresh and zeroed by the kernel each time.
    Worth about 8 % of a training step (docs/benchmarks.md); the process does not give memory back. glibc reads the
    variables for this before Python starts, hence the call. Does nothing with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return None
    settings = ((_M_MMAP_THRESHOLD, _KEPT_BLOCK), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2 * _KEPT_BLOCK))
    if not all(mallopt(option, value) for option, value in settings):
        return None
    return "up to 32 MB each stay with the process: fewer page faults a step"


CPU = Backend(
    name="cpu",
    device_type="cpu",
    collectives="gloo",
    vendor="any",
    process_setup=keep_freed_memory,
    environment=(
        # A fresh 268 MB tensor was filled in 12 ms with huge pages, in 73 ms without: docs/benchmarks.md.
        Variable("THP_MEM_ALLOC_ENABLE", "1", "huge pages for large tensors: far fewer page faults"),
        # libgomp's own number lets a thread spin for milliseconds, and whoever has work for its core waits. Measured
        # beside other programs, with its price on a quiet machine: docs/benchmarks.md.
        Variable(
            "GOMP_SPINCOUNT",
            "10000",
            "threads that wait for others soon let go of their core, which somebody else may need",
            older_names=("OMP_WAIT_POLICY",),
        ),
        # 32 processes: 22 open files each in place of 59 (docs/operations.md).
        Variable("TORCH_GLOO_LAZY_INIT", "1", "processes connect when they first exchange something"),
        Variable("OMP_NUM_THREADS", None, "threads of one operation; recipes set it by chip.threads"),
    ),
    capabilities={
        "bf16": bf16_units,
        "bf16_reduce": Capability(True, "Gloo all_reduce and reduce_scatter, 2 processes", "run"),
        "fsdp2": Capability(True, "trains on Gloo; needs a plain sum for gradients", "run"),
        "fused_adamw": Capability(True, "about 4x faster than the loop", "run"),
        "compile": compiler,
        "deterministic": Capability(True, "same thread count, same bits", "run"),
        "grouped_matmul": Capability(True, "fp32 and bf16; rows aligned to 16 bytes", "run"),
        "grouped_heads_attention": Capability(True, "torch's own", "run"),
        "inf_nan": Capability(True, "IEEE 754", "run"),
    },
)
