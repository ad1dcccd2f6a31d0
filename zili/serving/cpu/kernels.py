"""kernels.c, compiled for the sizes of a model where the machine has a compiler."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zili.chips.cpu import compiler_command
from zili.config.model import ModelConfig

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("kernels.c")
# Nothing of -ffast-math that would take numbers for finite: damaged weights are noticed by NaN.
_OPTIONS = (
    *("-std=c11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_NUMBERS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}


class Kernels:
    """The functions of kernels.c, which says what they do, on tensors of `dtype`."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        count, place = ctypes.c_int64, ctypes.c_void_p
        self._product, self._norm, self._swiglu = library.product, library.norm, library.swiglu
        self._place, self._attend = library.place, library.attend
        self._block = library.block()
        self._product.argtypes = (count, count, count, *[place] * 5)
        self._norm.argtypes = (count, count, place, place, ctypes.c_float, place)
        self._swiglu.argtypes = (count, count, place, place)
        self._place.argtypes = (count, *[place] * 6)
        self._attend.argtypes = (count, place, count, *[place] * 5)
        self._norm.restype = self._swiglu.restype = self._place.restype = None

    def laid_out(self, weight: Tensor) -> Tensor:
        """`weight [O, I]` as `product` reads it."""
        whole = F.pad(weight, (0, 0, 0, -len(weight) % self._block))
        return whole.unflatten(0, (-1, self._block)).transpose(1, 2).contiguous()

    def product(self, x: Tensor, weight: Tensor, out: int, bias: Tensor | None, other: Tensor | None = None) -> Tensor:
        """`x [..., I]` times a weight of `out` rows `laid_out`, plus `bias [O]` in float32, plus `other [..., O]`."""
        x, other = x.contiguous(), None if other is None else other.contiguous()
        to = x.new_empty((*x.shape[:-1], out))
        width = x.shape[-1]
        pointers = (None if one is None else one.data_ptr() for one in (x, weight, bias, other, to))
        if not self._product(x.numel() // width, width, out, *pointers):
            raise MemoryError("no memory for the rows of a product")
        return to

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of `x [..., D]`, `weight [D]` in float32."""
        x = x.contiguous()
        out = torch.empty_like(x)
        width = weight.numel()
        self._norm(x.numel() // width, width, x.data_ptr(), weight.data_ptr(), eps, out.data_ptr())
        return out

    def swiglu(self, joined: Tensor) -> Tensor:
        """`silu(gate) * up` of `joined [..., 2F]`, gate first; `[..., F]`."""
        width = joined.shape[-1] // 2
        out = joined.new_empty((*joined.shape[:-1], width))
        self._swiglu(out.numel() // width, width, joined.data_ptr(), out.data_ptr())
        return out

    def place(self, heads: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Turn the queries of `heads [1, N, (H + 2K) * d]` by `cos, sin [N, d]`; put the rest in `rows [N * K]`."""
        self._place(heads.shape[1], *(one.data_ptr() for one in (heads, cos, sin, rows, keys, values)))

    def attend(self, query: Tensor, positions: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Of `query [n, H, d]`, each at `positions [n]` of the sequence that `rows [n * K]` are of; `[n, H, d]`."""
        if query.stride()[1:] != (query.shape[-1], 1):
            query = query.contiguous()
        out = torch.empty(query.shape, dtype=query.dtype)
        pointers = (one.data_ptr() for one in (positions, rows, keys, values, out))
        if not self._attend(len(query), query.data_ptr(), query.stride(0), *pointers):
            raise MemoryError("no memory for the scores of attention")
        return out


def compiled(config: ModelConfig, dtype: torch.dtype) -> Kernels | None:
    """For a model's attention on a CPU; None: there are none for it, or, as standard error then says, no compiler."""
    if dtype not in _NUMBERS or config.latent is not None:
        return None
    sizes = {"HEADS": config.heads, "KV_HEADS": config.kv_heads, "HEAD_DIM": config.head_dim}
    flags = [*_OPTIONS, *_NUMBERS[dtype], *(f"-D{name}={size}" for name, size in sizes.items())]
    try:
        # Half a second at each start, and no file of anybody else is loaded.
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "kernels.so"
            command = [compiler_command(), *flags, "-o", str(file), "-x", "c", str(_SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            return Kernels(ctypes.CDLL(str(file)), dtype)
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), str(error))
    except OSError as error:  # no compiler, no room, nowhere to load from
        reason = str(error)
    _LOG.warning("answers come slower: kernels.c was not compiled by %s (%s)", compiler_command(), reason)
    return None
