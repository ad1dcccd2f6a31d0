"""Watches what runs inside a training step for what a real accelerator would suffer from."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zili

_HOUSE = Path(zili.__file__).parent


class Watch(TorchDispatchMode):
    """Counts, by operation and source line, what lands on another device and what makes the host wait."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.elsewhere: Counter[str] = Counter()
        """Tensors of more than one element made on another device."""
        self.waits: Counter[str] = Counter()
        """Results that the host must have before it can go on: values, and sizes that depend on values."""
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        out = function(*arguments, **(keywords or {}))
        self.operations += 1
        if any(frame.filename.endswith("npu_operations.py") for frame in traceback.extract_stack()):
            return out  # what stands in for a vendor's operation, and its checks
        given = any(self._is_here(leaf) for leaf in tree_leaves((arguments, keywords)))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and not leaf.is_meta]
        leaves_the_device = given and any(not self._is_here(tensor) for tensor in made)
        if given and (leaves_the_device or self._depends_on_values(function, arguments, keywords or {})):
            self.waits[f"{function} at {_source()}"] += 1
        elif any(not self._is_here(tensor) and tensor.numel() > 1 for tensor in made):
            innermost = [Path(frame.filename).name for frame in traceback.extract_stack(limit=5)]
            if "distributed_c10d.py" not in innermost:  # what Gloo does on the host with the device's bytes
                self.elsewhere[f"{function} at {_source()}"] += 1
        return out

    def _is_here(self, leaf: object) -> bool:
        return isinstance(leaf, Tensor) and leaf.device.type == self.device_type

    @staticmethod
    def _depends_on_values(function: Any, arguments: Any, keywords: dict[str, Any]) -> bool:
        if torch.Tag.data_dependent_output in function.tags:
            return True
        if function is torch.ops.aten._grouped_mm.default:
            return True  # a device without a kernel of its own has torch's, which reads the ends of groups on the host
        if function is torch.ops.aten.index.Tensor:
            return any(index is not None and index.dtype == torch.bool for index in arguments[1])
        return torch.Tag.dynamic_output_shape in function.tags and keywords.get("output_size") is None


def _source() -> str:
    """The innermost line of this house that led here; else torch's, as where its thread runs the backward pass."""
    frames = [(Path(frame.filename), frame) for frame in traceback.extract_stack()[:-2]]
    frames = [(path, frame) for path, frame in frames if frame.name != "<listcomp>"]
    own = [
        f"{path.relative_to(_HOUSE)}:{frame.lineno} {frame.name}"
        for path, frame in frames
        if path.is_relative_to(_HOUSE)
    ]
    return (
        own[-1] if own else " < ".join(f"{path.name}:{frame.lineno} {frame.name}" for path, frame in frames[-1:-4:-1])
    )
