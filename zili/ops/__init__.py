"""The few operations worth fusing. Callers use these names; which version runs is chosen once, at start.

`reference` declares each operation: its signature, its meaning and its plain PyTorch form. `registry` chooses among the
faster ones.
"""

from __future__ import annotations

from zili.ops import reference
from zili.ops.reference import IGNORE_INDEX, Reduction, VocabularyPart
from zili.ops.registry import choose, chosen, operation, runs_on, versions

__all__ = [
    "IGNORE_INDEX",
    "Reduction",
    "VocabularyPart",
    "add_rms_norm",
    "attention",
    "choose",
    "chosen",
    "grouped_matmul",
    "linear",
    "linear_cross_entropy",
    "permute",
    "rms_norm",
    "rotate",
    "runs_on",
    "swiglu",
    "unpermute",
    "versions",
]

linear = operation(reference.linear)
rms_norm = operation(reference.rms_norm)
add_rms_norm = operation(reference.add_rms_norm)
rotate = operation(reference.rotate)
swiglu = operation(reference.swiglu)
attention = operation(reference.attention)
grouped_matmul = operation(reference.grouped_matmul)
permute = operation(reference.permute)
unpermute = operation(reference.unpermute)
linear_cross_entropy = operation(reference.linear_cross_entropy)
