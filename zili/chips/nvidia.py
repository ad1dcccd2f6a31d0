"""NVIDIA: built into torch's CUDA wheels, no plugin."""

from __future__ import annotations

import importlib.util
import sys

from zili.chips.backend import Backend, Capability, Variable, VersionFile


def _compute_capability() -> tuple[int, int] | None:
    """The current device's; None before activation, since the question needs torch and an open device."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major, minor


def _from_generation(needed: tuple[int, int], generation: str) -> Capability:
    here = _compute_capability()
    if here is None:
        return Capability(True, f"{generation} and newer; the device itself is asked after activation")
    verdict = "has" if here >= needed else "needs"
    return Capability(
        here >= needed,
        f"compute capability {here[0]}.{here[1]}; {generation} ({needed[0]}.{needed[1]}) {verdict} it",
        "documented",
    )


def bf16() -> Capability:
    """Before Ampere torch emulates bf16, slowly: say no then."""
    return _from_generation((8, 0), "Ampere")


def triton() -> Capability:
    if importlib.util.find_spec("triton"):
        return Capability(True, "Triton is installed", "documented")
    return Capability(False, "Triton is not installed (torch's CUDA wheels bring it)", "documented")


NVIDIA = Backend(
    name="nvidia",
    device_type="cuda",
    collectives="nccl",
    vendor="NVIDIA",
    install="install torch 2.13's CUDA build (pytorch.org/get-started names the index for your driver)",
    torch_build="cuda",
    device_nodes="/dev/nvidia[0-9]*",
    version_files=(VersionFile("driver", ("/proc/driver/nvidia/version",), r"(\d{3,}\.\d+(?:\.\d+)?)"),),
    visible_devices="CUDA_VISIBLE_DEVICES",
    environment=(
        Variable(
            "PYTORCH_ALLOC_CONF",
            "expandable_segments:True",
            "less fragmentation under changing sizes (torchtitan's launcher sets it)",
            older_names=("PYTORCH_CUDA_ALLOC_CONF",),
        ),
        Variable(
            "CUBLAS_WORKSPACE_CONFIG",
            ":4096:8",
            "cuBLAS repeats bitwise only with a fixed workspace (PyTorch, reproducibility notes)",
            only_deterministic=True,
        ),
        Variable("CUDA_LAUNCH_BLOCKING", None, "debugging: every kernel waits"),
        Variable("NCCL_DEBUG", None, "NCCL's log level"),
    ),
    operations="zili.ops.nvidia",
    capabilities={
        "bf16": bf16,
        "bf16_reduce": Capability(True, "ncclBfloat16", "documented"),
        "fsdp2": Capability(True, "the device PyTorch develops it on", "documented"),
        "fused_adamw": Capability(True, "PyTorch documentation of AdamW", "documented"),
        "compile": triton,
        "deterministic": Capability(True, "with CUBLAS_WORKSPACE_CONFIG; some operations raise", "documented"),
        "grouped_matmul": Capability(True, "bf16 on compute capability 8.0 and newer", "documented"),
        "grouped_heads_attention": Capability(
            True, "torch's own since 2.5; in fp32 not by a fused kernel", "documented"
        ),
        "inf_nan": Capability(True, "IEEE 754", "documented"),
    },
    notes=("Not run by us: written from PyTorch's documentation.",),
)
