"""Which gradients a step asks for: all of them, but beside adapters of low rank, where nothing else learns."""

from __future__ import annotations

from collections.abc import Mapping

from zili.models.arithmetic import Shape, is_adapter
from zili.planning.exact.job import Job

_BEFORE = {
    "query_up": ("query_down",),
    "key_value_up": ("key_value_down",),
    "output": ("query", "key", "value", "query_up", "key_value_up"),
    "down": ("gate", "up"),
}
"""Matrices of the same module that the input of another comes through; a feed-forward's comes through attention."""


def of_matrices(job: Job) -> bool:
    """Whether those of matrices are: beside adapters they stay as they are, and a teacher's do always."""
    return job.learns and job.model.lora is None


def of_input(job: Job, layer: int, matrix: str = "") -> bool:
    """Whether that of a layer's input is, or of the input of one of its matrices (`attention.output`).

    Beside adapters it is not before the first of them. Stages that are sent their input are always asked for it.
    """
    if not job.learns:
        return False
    if of_matrices(job) or not any(layer in stage and stage.start == 0 for stage in job.stages):
        return True
    if any(adapted(job.shapes(before)) for before in range(layer)):
        return True
    return _comes_through_adapters(matrix, job.shapes(layer))


def of_output(job: Job, layer: int) -> bool:
    """Whether that of a layer's output is."""
    return of_input(job, layer) or bool(adapted(job.shapes(layer)))


def adapted(shapes: Mapping[str, Shape]) -> set[str]:
    """Matrices of a block that have adapters."""
    return {matrix_of(name) for name in shapes if is_adapter(name)}


def matrix_of(name: str) -> str:
    """The matrix that a parameter of a block is, or is an adapter of."""
    return name.rpartition(".")[0] if name.endswith(("weight", "lora_a", "lora_b")) else name


def _comes_through_adapters(matrix: str, shapes: Mapping[str, Shape]) -> bool:
    module, _, kind = matrix.rpartition(".")
    before = [f"{module}.{other}" for other in _BEFORE.get(kind, ())]
    if kind in ("gate", "up", "router"):
        before = ["attention.output"]
    return any(other in adapted(shapes) or _comes_through_adapters(other, shapes) for other in before)
