"""How published tensors correspond to Zili's parameters: declared once, used in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zili.errors import CheckpointError
from zili.plurals import counted
from zili.release.tensors import Index, Tensors, cut


def _alone(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Rule:
    """One published tensor and the Zili parameters it holds; `merge(*split(t))` is `t`, byte for byte."""

    published: str
    parameters: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] = _alone
    merge: Callable[..., Tensor] = _itself
    expert: int | None = None
    """Where the parameters are stacks: which of their matrices this tensor holds. A stack has a rule for each."""

    @property
    def renames(self) -> bool:
        """Whether the two sides differ in name only."""
        return self.split is _alone


def same(published: str, parameter: str) -> Rule:
    """Another name for the same tensor."""
    return Rule(published, (parameter,))


def stacked(published: str, parameter: str, experts: int) -> list[Rule]:
    """`[E, O, I]` in a tensor `[O, I]` for each expert, under the name that `published` has with its number put in."""
    return [Rule(published.format(expert=i), (parameter,), expert=i) for i in range(experts)]


def paired_rows(published: str, parameter: str, plain: int, turned: int) -> Rule:
    """Rows that positions turn two neighbours at a time, 2 i and 2 i + 1, where Zili turns i and i + turned / 2.

    Rows come in groups, a head each: `plain` of them that are not turned, then `turned`.
    """

    def reordered(tensor: Tensor, sizes: tuple[int, int]) -> Tensor:
        heads = tensor.unflatten(0, (-1, plain + turned))
        rotary = heads[:, plain:].unflatten(1, sizes).transpose(1, 2).flatten(1, 2)
        return torch.cat((heads[:, :plain], rotary), dim=1).flatten(0, 1)

    return Rule(
        published,
        (parameter,),
        lambda tensor: (reordered(tensor, (turned // 2, 2)),),
        lambda tensor: reordered(tensor, (2, turned // 2)),
    )


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
        self._origin: dict[str, list[tuple[Rule, int]]] = {}
        """Where a parameter is: a rule and the place among its parameters, or of a stack one for each expert."""
        for rule in rules:
            for i, name in enumerate(rule.parameters):
                if rule.expert is None:
                    self._origin[name] = [(rule, i)]
                else:
                    self._origin.setdefault(name, []).append((rule, i))

    def describe(self) -> dict[str, Tensor]:
        published = self._published.describe()
        described = {}
        for name, ((rule, i), *others) in self._origin.items():
            tensor = rule.split(published[rule.published])[i]
            described[name] = tensor if rule.expert is None else tensor.expand(1 + len(others), *tensor.shape)
        return described

    def read(self, name: str, index: Index | None = None) -> Tensor:
        places = self._origin[name]
        if places[0][0].expert is None:
            return self._read_one(*places[0], index)
        if index is None:
            return torch.stack([self._read_one(*place, None) for place in places])
        wanted = places[index[0]]
        # No experts: of none of them there is still a shape.
        parts = [self._read_one(*place, index[1:]) for place in wanted or places[:1]]
        return torch.stack(parts)[: len(wanted)]

    def _read_one(self, rule: Rule, i: int, index: Index | None) -> Tensor:
        if rule.renames:
            return self._published.read(rule.published, index)
        return cut(rule.split(self._published.read(rule.published))[i], index)


class PublishedTensors(Tensors):
    """Zili parameters seen as published tensors."""

    def __init__(self, parameters: Tensors, rules: list[Rule]) -> None:
        self._parameters = parameters
        self._described = parameters.describe()
        self._rules = {rule.published: rule for rule in rules}

    def describe(self) -> dict[str, Tensor]:
        return {name: merged(rule, self._described) for name, rule in self._rules.items()}

    def read(self, name: str, index: Index | None = None) -> Tensor:
        rule = self._rules[name]
        return cut(rule.merge(*(self._part(parameter, rule.expert) for parameter in rule.parameters)), index)

    def _part(self, name: str, expert: int | None) -> Tensor:
        if expert is None:
            return self._parameters.read(name)
        whole = tuple(slice(0, size) for size in self._described[name].shape[1:])
        return self._parameters.read(name, (slice(expert, expert + 1), *whole))[0]


def merged(rule: Rule, parameters: Mapping[str, Tensor]) -> Tensor:
    """The published tensor of `rule`, of `parameters` that are at hand."""
    parts = (parameters[name] for name in rule.parameters)
    return rule.merge(*(part if rule.expert is None else part[rule.expert] for part in parts))


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
        raise CheckpointError(
            f"{where}: {counted(len(wrong), 'tensor')} of another shape than its configuration: {_first(wrong)}"
        )


def _first(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
