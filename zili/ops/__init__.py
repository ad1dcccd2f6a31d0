"""The few operations worth fusing. Callers use these names; which version runs is chosen once, at start."""

from zili.ops.reference import (
    IGNORE_INDEX,
    attention,
    linear,
    linear_cross_entropy,
    rms_norm,
    rotate,
    swiglu,
)

__all__ = ["IGNORE_INDEX", "attention", "linear", "linear_cross_entropy", "rms_norm", "rotate", "swiglu"]
