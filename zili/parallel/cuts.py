"""How weights are held, as data: which dimension of each matrix tensor-parallel processes cut, and what is taken in
fp32 in a lowered run. Imports no torch: planning reads it too."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

ROWS, COLUMNS, WHOLE = 0, 1, None


class Cut(NamedTuple):
    """How the parameters of the modules that match a name are cut: a dimension, or not."""

    modules: str
    weight: int | None
    bias: int | None = WHOLE


PARAMETERS = (
    Cut("embedding", ROWS),
    Cut("head", ROWS),
    Cut("*.attention.query", ROWS, ROWS),
    Cut("*.attention.key", ROWS, ROWS),
    Cut("*.attention.value", ROWS, ROWS),
    Cut("*.attention.query_up", ROWS),
    Cut("*.attention.key_value_up", ROWS),
    Cut("*.attention.output", COLUMNS),
    Cut("*.feed_forward.gate", ROWS, ROWS),
    Cut("*.feed_forward.up", ROWS, ROWS),
    Cut("*.feed_forward.down", COLUMNS),
    Cut("*", WHOLE),
)
"""The first that matches holds. What is whole acts on some of the tokens, so its gradients are terms of a sum."""


def cut_of(module: str, parameter: str) -> int | None:
    """The dimension in which `parameter` of the module of that name is cut; None: it is whole.

    Of an adapter `B A` the factor that has the cut dimension of the matrix is cut with it.
    """
    cut = next(cut for cut in PARAMETERS if fnmatchcase(module, cut.modules))
    if parameter == "lora_a":
        return COLUMNS if cut.weight == COLUMNS else WHOLE
    if parameter == "lora_b":
        return ROWS if cut.weight == ROWS else WHOLE
    return cut.bias if parameter == "bias" else cut.weight


def stays_fp32(name: str) -> bool:
    """Whether the weight of that name is taken in fp32 also where matrix products are not: norms and routers.

    So it is in one process, where autocast lowers what products take and nothing else. The embedding, whose rows join
    the residual stream, is fp32 too, but large.
    """
    return name.endswith(("norm.weight", "router.weight"))
