"""FLOPs of a step on one process, as they are executed: products, attention, and what is computed again.

Convention: two a multiplication and addition. Attention counts by the shapes its kernel is given: a causal row of S
tokens counts S^2 although a kernel may skip half of it. A model's own FLOPs, of which utilisation is a share, are
`zili.models.arithmetic.training_flops_per_token`.
"""

from __future__ import annotations

from math import prod

from zili.models.arithmetic import is_adapter, matrices
from zili.parallel.cuts import cut_of
from zili.planning.exact import gradients
from zili.planning.exact.job import Job


def flops(job: Job) -> dict[str, int]:
    """FLOPs of one step by phase, `forward` and `backward`; optimizers left out (AdamW multiplies no matrices)."""
    forward = backward = 0
    for layer in job.layers:
        (products, back), attention = _products(job, layer), _attention(job)
        forward += products + attention
        backward += back
        if gradients.of_input(job, layer, "attention.output"):
            backward += _attention_backward(job)
        if job.config.training.recompute == "full" and gradients.of_output(job, layer):
            backward += products + attention - _not_again(job, layer)
    if job.has_last:
        # Logits, and both their gradients; beside adapters that of the matrix is not asked for.
        logits, both = _logits(job), 1 + gradients.of_matrices(job)
        losses = 1 + job.predicts_further
        # Made at once (`zili.ops.chunked_cross_entropy`); of preferences logits alone, and backward once more.
        at_once = job.config.preference is None
        forward += losses * logits * (1 + both if at_once else 1)
        backward += 0 if at_once else logits * (1 + both)
        if job.predicts_further:
            joined = 2 * job.own_tokens * 2 * job.model.hidden_size**2
            forward += joined
            backward += both * joined
    forward += _asked(job.teacher) if job.teacher is not None else 0
    return {"forward": job.micro_batches * forward, "backward": job.micro_batches * backward}


def _asked(teacher: Job) -> int:
    """Of a micro-batch, what a teacher's answer takes."""
    layers = sum(_products(teacher, layer)[0] + _attention(teacher) for layer in teacher.layers)
    return layers + (_logits(teacher) if teacher.has_last else 0)


def _products(job: Job, layer: int) -> tuple[int, int]:
    """Matrix products of a layer, forward and backward. Cut or whole, a matrix meets each token once among the
    processes."""
    forward = backward = 0
    for matrix in matrices(job.model, layer):
        name, size = matrix.name, matrix.met(job.model) * _times(job, matrix.name)
        forward += size
        of_input = name.endswith("lora_b") or gradients.of_input(job, layer, gradients.matrix_of(name))
        backward += size * (matrix.learned + of_input)
    return 2 * job.own_tokens * forward, 2 * job.own_tokens * backward


def _times(job: Job, name: str) -> int:
    """How many tensor-parallel processes take the same tokens through a parameter of a block: all of them through the
    factor of an adapter that is whole beside a matrix that is cut."""
    module, _, key = f"block.{name}".rpartition(".")
    whole = is_adapter(name) and cut_of(module, key) is None and cut_of(module, "weight") is not None
    return job.layout.tensor if whole else 1


def _scores(job: Job) -> int:
    """Pairs of a query and a key, in all heads here."""
    rows, context = job.sequence, job.layout.context
    pairs = rows * rows
    if context > 1:
        # Two pieces of each row, of which the one sees up to where it ends and so does its mirror image.
        width = rows // (2 * context)
        pairs = width * width * (2 * context + 1)
    return job.micro_batch * pairs * job.model.heads // job.layout.tensor


def _attention(job: Job) -> int:
    return 2 * _scores(job) * (job.model.head_dim + job.model.value_head_dim)


def _attention_backward(job: Job) -> int:
    """Scores once more, and the gradients of values, probabilities, queries and keys (Dao et al. 2022, algorithm 4)."""
    return 2 * _scores(job) * (3 * job.model.head_dim + 2 * job.model.value_head_dim)


def _not_again(job: Job, layer: int) -> int:
    """A block computed again stops before its last product: nothing after that is needed for a gradient."""
    mixture = job.model.mixture
    width, last = job.model.ffn_hidden_size, "feed_forward.down"
    if mixture is not None and job.model.has_experts(layer):
        width, last = mixture.shared_experts * mixture.ffn_hidden_size, "feed_forward.shared.down"
    adapter = f"{last}.lora_b"
    shape = job.shapes(layer).get(adapter)
    return 2 * job.own_tokens * (prod(shape) * _times(job, adapter) if shape else width * job.model.hidden_size)


def _logits(job: Job) -> int:
    return 2 * job.tokens * job.model.hidden_size * job.model.vocab_size // job.layout.tensor
