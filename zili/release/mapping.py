"""How published tensors correspond to Zili's parameters: declared once, used in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from zili.errors import CheckpointError
from zili.release.tensors import Tensors


@dataclass(frozen=True)
class Rule:
    """One published tensor and the Zili parameters it holds; `merge(*split(t))` is `t`, byte for byte."""

    published: str
    parameters: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    merge: Callable[..., Tensor]


def same(published: str, parameter: str) -> Rule:
    """Another name for the same tensor."""
    return Rule(published, (parameter,), lambda tensor: (tensor,), lambda tensor: tensor)


def interleaved_by_head(published: str, key: str, value: str, head_dim: int) -> Rule:
    """`[2 K d, D]` whose rows are K_0, V_0, K_1, V_1, ... a kv head at a time, not all keys and then all
    values.

    Source: Tele-AI/TeleChat2 modeling_telechat.py (view to [.., K, 2 d], split in two); the TeleChat-7B and
    12B files do the same.
    """

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        heads = tensor.unflatten(0, (-1, 2, head_dim))
        return heads[:, 0].flatten(0, 1), heads[:, 1].flatten(0, 1)

    def merge(keys: Tensor, values: Tensor) -> Tensor:
        heads = (keys.unflatten(0, (-1, head_dim)), values.unflatten(0, (-1, head_dim)))
        return torch.stack(heads, dim=1).flatten(0, 2)

    return Rule(published, (key, value), split, merge)


def transposed_columns(published: str, parameters: tuple[str, ...], widths: tuple[int, ...]) -> Rule:
    """GPT-2's Conv1D, `[in, out]`, with one block of columns for each parameter `[out, in]`."""

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        return tuple(block.t() for block in tensor.split(widths, dim=1))

    def merge(*blocks: Tensor) -> Tensor:
        return torch.cat([block.t() for block in blocks], dim=1)

    return Rule(published, parameters, split, merge)


class ImportedTensors(Tensors):
    """Published tensors seen as Zili parameters."""

    def __init__(self, published: Tensors, rules: list[Rule]) -> None:
        self._published = published
        self._origin = {name: (rule, i) for rule in rules for i, name in enumerate(rule.parameters)}

    def describe(self) -> dict[str, Tensor]:
        published = self._published.describe()
        return {name: rule.split(published[rule.published])[i] for name, (rule, i) in self._origin.items()}

    def read(self, name: str) -> Tensor:
        rule, i = self._origin[name]
        return rule.split(self._published.read(rule.published))[i]


class PublishedTensors(Tensors):
    """Zili parameters seen as published tensors."""

    def __init__(self, parameters: Tensors, rules: list[Rule]) -> None:
        self._parameters = parameters
        self._rules = {rule.published: rule for rule in rules}

    def describe(self) -> dict[str, Tensor]:
        parameters = self._parameters.describe()
        return {name: rule.merge(*(parameters[part] for part in rule.parameters)) for name, rule in self._rules.items()}

    def read(self, name: str) -> Tensor:
        rule = self._rules[name]
        return rule.merge(*(self._parameters.read(part) for part in rule.parameters))


def check_tensors(found: dict[str, Tensor], expected: dict[str, tuple[int, ...]], where: object) -> None:
    """Names and shapes of `found` are those `expected`.

    Raises:
        CheckpointError: tensors missing, unexpected, or of another shape; the first few named, with counts.
    """
    for problem, names in (
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
    ):
        if names:
            raise CheckpointError(
                f"{where}: {len(names)} {problem} of {len(expected)} tensors its configuration asks for: "
                f"{_first(names)}; the weights belong to another configuration or are incomplete"
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wrong = [f"{name} is {shapes[name]}, not {shape}" for name, shape in expected.items() if shapes[name] != shape]
    if wrong:
        raise CheckpointError(f"{where}: {len(wrong)} tensors of another shape than its configuration: {_first(wrong)}")


def _first(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
