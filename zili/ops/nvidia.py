"""Liger Kernel's fused operations (`pip install liger-kernel`, 0.8 read), where it is installed; else torch's own.

Not run by us: there is no NVIDIA device here. A version is compared with the reference on the device when it is chosen.
It is not taken where it differs, fails or is no faster, nor where blocks are compiled, since torch fuses it there.
Attention is torch's `scaled_dot_product_attention`, which brings its flash kernels, and blocks are compiled where
Triton is.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from zili.ops.versions import EAGER, Version


def _lacks(device_type: str, precision: str) -> str | None:
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`: normed in fp32, cast, then multiplied, Liger's casting mode "llama"."""
    # The upstream gradient is not Liger's to overwrite: a residual branch may want it too.
    return _function("rms_norm", "LigerRMSNormFunction").apply(x, weight, eps, 0.0, "llama", False)


# Not its SwiGLU: that overwrites its inputs with their gradients, which are another's too where blocks are recomputed.
VERSIONS = (Version("rms_norm", "liger", rms_norm, _lacks, needs=EAGER),)
