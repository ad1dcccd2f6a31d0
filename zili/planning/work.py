"""FLOPs of a step on one process, as they are executed: products, attention, and what is computed again.

Convention: two a multiplication and addition; attention by the shapes its kernel is given, so that a causal row of S
tokens counts S^2 although a kernel may skip half of it. A model's own FLOPs, of which utilisation is a share, are
`zili.models.arithmetic.training_flops_per_token`.
"""

from __future__ import annotations

from math import prod

from zili.planning.job import Job


def flops(job: Job) -> dict[str, int]:
    """Of one step by phase, `forward` and `backward`; optimizers left out (AdamW multiplies no matrices)."""
    forward = backward = 0
    for layer in job.layers:
        products, attention = _products(job, layer), _attention(job)
        forward += products + attention
        backward += 2 * products + _attention_backward(job)
        if job.config.training.recompute == "full":
            backward += products + attention - _not_again(job, layer)
    if job.has_last:
        forward += _loss(job)
        if job.predicts_further:
            joined = 2 * job.own_tokens * 2 * job.model.hidden_size**2
            forward += joined + _loss(job)
            backward += 2 * joined
        if job.config.preference is not None:
            backward += 3 * _loss(job)  # once more, and both their gradients
    return {"forward": job.micro_batches * forward, "backward": job.micro_batches * backward}


def _products(job: Job, layer: int) -> int:
    """Matrix products of a layer, forward. Cut or whole, a matrix meets each token once among the processes."""
    total = 0
    for shape in job.shapes(layer).values():
        if len(shape) == 2:
            total += prod(shape)
        elif len(shape) == 3:
            assert job.model.mixture is not None
            total += prod(shape[1:]) * job.model.mixture.top_k
    return 2 * job.own_tokens * total


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
    width = job.model.ffn_hidden_size
    if mixture is not None and job.model.has_experts(layer):
        width = mixture.shared_experts * mixture.ffn_hidden_size
    return 2 * job.own_tokens * width * job.model.hidden_size


def _loss(job: Job) -> int:
    """Logits and both their gradients, which are made at once (`zili.ops.chunked_cross_entropy`); of preferences logits
    alone."""
    products = 3 if job.config.preference is None else 1
    return products * 2 * job.tokens * job.model.hidden_size * job.model.vocab_size // job.layout.tensor
