"""FLOPs of a step on one process, as they are executed: products, attention, and what is computed again.

Convention: two a multiplication and addition. Attention counts by the shapes its kernel is given: a causal row of S
tokens counts S^2 although a kernel may skip half of it. A model's own FLOPs, of which utilisation is a share, are
`zili.models.arithmetic.training_flops_per_token`. The model of time (`zili.planning.fitted`) has its FLOPs from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from zili.planning.exact import gradients
from zili.planning.exact.job import Job
from zili.planning.exact.weights import layer_parameters
from zili.planning.run import Run


class Product(NamedTuple):
    """A matrix product of a layer's forward pass: what one process computes of it for a micro-batch."""

    name: str
    """Its weight's."""
    rows: float
    outputs: int
    inputs: int
    experts: int
    """How many experts share the rows; 0: all rows go through one matrix."""
    learned: bool

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.outputs * self.inputs


def products(run: Run, layer: int) -> Iterator[Product]:
    """Those of a layer, in the order of its weights; experts are equally loaded."""
    for parameter in layer_parameters(run.model, layer, run.tensor, run.expert):
        if len(parameter.shape) < 2:
            continue
        *stack, outputs, inputs = parameter.shape
        rows = run.rows if parameter.all_tokens else run.own_rows
        if stack:
            assert run.model.mixture is not None
            rows *= run.model.mixture.top_k
        yield Product(parameter.name, rows, outputs, inputs, stack[0] if stack else 0, parameter.learned)


def not_repeated(run: Run, layer: int) -> list[Product]:
    """Products that are left out where a block is computed again: its last one, since nothing after it is needed for a
    gradient, and what multi-token prediction has before its block.

    An adapter's factors come behind its matrix. Behind experts there is no product, unless some are shared.
    """
    name = ".feed_forward.shared.down." if run.model.has_experts(layer) else ".feed_forward.down."
    made = list(products(run, layer))
    last = [product for product in made if name in product.name]
    return [product for product in made if product.name == "next_tokens.projection.weight"] + last[-1:]


def scores(run: Run, *, seen: bool = False) -> float:
    """Pairs of a query and a key in a layer's heads here, for a micro-batch: those that a kernel is given, or those
    alone that are `seen`, which are the half of each row's square that is not masked."""
    rows, context = run.sequence, run.context
    pairs = rows**2 / 2 / context if seen else float(rows**2)
    if context > 1 and not seen:
        # Two pieces of each row, of which the one sees up to where it ends and so does its mirror image.
        width = rows // (2 * context)
        pairs = width**2 * (2 * context + 1)
    return run.micro_batch * pairs * run.model.heads / run.tensor


def attention(run: Run, *, seen: bool = False) -> tuple[float, float]:
    """FLOPs of a layer's attention in one kernel, forward and backward.

    Backward: scores once more, and the gradients of values, probabilities, queries and keys (Dao et al. 2022,
    algorithm 4).
    """
    pairs, key, value = scores(run, seen=seen), run.model.head_dim, run.model.value_head_dim
    return 2 * pairs * (key + value), 2 * pairs * (3 * key + 2 * value)


def logits(run: Run) -> float:
    """FLOPs of a micro-batch's logits; both of their gradients take as much each."""
    return 2 * run.rows * run.model.hidden_size * run.model.vocab_size / run.tensor


def loss(run: Run) -> float:
    """FLOPs of a micro-batch's logits with their gradients; beside adapters that of the matrix is not asked for."""
    return logits(run) * (3 if run.model.lora is None else 2)


def flops(job: Job) -> dict[str, float]:
    """FLOPs of one step by phase, `forward` and `backward`; optimizers left out (AdamW multiplies no matrices)."""
    run = job.run
    forward = backward = 0.0
    for layer in job.layers:
        forward += _forward(run, layer)
        backward += _backward(job, layer)
    if job.has_last:
        # Gradients are made at once (`zili.ops.chunked_cross_entropy`), but those of preferences.
        forward += logits(run) if run.logits_twice else loss(run) * (1 + job.predicts_further)
        backward += loss(run) if run.logits_twice else 0
    if job.teacher is not None:
        answers = sum(_forward(job.teacher.run, layer) for layer in job.teacher.layers)
        forward += answers + (logits(job.teacher.run) if job.teacher.has_last else 0)
    return {"forward": job.micro_batches * forward, "backward": job.micro_batches * backward}


def _forward(run: Run, layer: int) -> float:
    return sum(product.flops for product in products(run, layer)) + attention(run)[0]


def _backward(job: Job, layer: int) -> float:
    """What a layer's backward pass takes: the gradients that are asked for, and what is computed again."""
    run, found = job.run, 0.0
    for product in products(run, layer):
        inside_block = product.name.split(".", 2)[2]
        of_input = gradients.of_input(job, layer, gradients.matrix_of(inside_block))
        found += product.flops * (product.learned + (of_input or product.name.endswith("lora_b")))
    if gradients.of_input(job, layer, "attention.output"):
        found += attention(run)[1]
    if run.recompute == "full" and gradients.of_output(job, layer):
        found += _forward(run, layer) - sum(product.flops for product in not_repeated(run, layer))
    return found
