"""What one process sends and receives in a step: every collective of `zili.parallel`, in closed form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from zili.planning.exact import gradients
from zili.planning.exact.job import Job
from zili.planning.exact.weights import stage_groups, weight_groups

_FP32 = 4
_INT64 = 8
_LOGITS = {False: 512 * 1024 * 1024, True: 4 * 1024 * 1024}
"""Elements of logits at a time, elsewhere and on the host (`zili.ops.chunked_cross_entropy`), and at least 64 rows."""
_LEAST_ROWS = 64
_ALIVE = 6
"""Beside a teacher a sixth of them (`zili.ops.distillation`)."""
_BUCKET = 64 << 20
"""Bytes of gradients that are summed by one call (`zili.parallel.data`)."""
_REQUESTS = 5
"""What a process asks of all, beside the figures of a step (`zili.training.requests`)."""


@dataclass(frozen=True)
class Message:
    """A kind of collective, as often as it happened alike."""

    kind: str
    mesh: str
    """What its processes share: a dimension of the meshes of `zili.parallel.world`."""
    processes: int
    bytes: int
    """Bytes of the larger side on this process: what a gather gives, a reduction or an exchange takes, or is sent."""


def messages(job: Job) -> Counter[Message]:
    """All of a step, by kind and size, of a process at the job's place; experts equally loaded."""
    found: Counter[Message] = Counter()
    parts = [(part, job) for part in (_blocks, _ends, _stages, _weights, _whole_gradients, _figures)]
    if job.teacher is not None:
        parts += [(part, job.teacher) for part in (_blocks, _ends, _stages, _weights)]
    for part, whose in parts:
        for message, times in part(whose):
            if message.processes > 1 and times:
                found[_named(message, job)] += times
    return found


def _named(message: Message, job: Job) -> Message:
    """What all processes share has one name, whatever they share it for."""
    layout = job.layout
    return replace(message, mesh=layout.world_name) if message.processes == layout.world else message


Some = Iterator[tuple[Message, int]]
"""Messages, and how often."""


def _blocks(job: Job) -> Some:
    """Inside blocks: tokens between tensor-parallel processes, keys between those of a context, rows to experts."""
    again, count = job.config.training.recompute == "full", job.micro_batches
    for layer in job.layers:
        back, inside = gradients.of_output(job, layer), gradients.of_input(job, layer, "feed_forward.gate")
        forward = 1 + (again and back)
        for part, size in _entered(job, layer):
            yield _tensor(job, "all_gather", size), count * forward
            yield _tensor(job, "reduce_scatter", size), count * gradients.of_input(job, layer, part)
        dense = not job.model.has_experts(layer)
        left = job.tokens * job.model.hidden_size * job.product_bytes
        # The last one of a block is not asked for again: nothing after it is needed for a gradient.
        yield _tensor(job, "reduce_scatter", left), count * (forward + dense)
        yield _tensor(job, "all_gather", left), count * (inside + (dense and back))
        for behind, size in _keys_and_values(job):
            asked = gradients.of_input(job, layer) or bool(gradients.adapted(job.shapes(layer)) & behind)
            yield Message("all_gather", "context", job.layout.context, size), count * forward
            yield Message("reduce_scatter", "context", job.layout.context, size), count * asked
        if not dense:
            yield from _to_experts(job, forward, inside)


def _tensor(job: Job, kind: str, size: int) -> Message:
    return Message(kind, "tensor", job.layout.tensor, size)


def _entered(job: Job, layer: int) -> Iterator[tuple[str, int]]:
    """Bytes gathered before the products of a layer, and one of these."""
    latent = job.model.latent
    width = job.model.hidden_size
    short = width if latent is None else latent.query_rank + latent.key_value_rank + latent.rope_head_dim
    yield "attention.query", job.tokens * short * job.product_bytes
    if not job.model.has_experts(layer):
        yield "feed_forward.gate", job.tokens * width * job.product_bytes


def _keys_and_values(job: Job) -> Iterator[tuple[set[str], int]]:
    """Bytes of each, and the matrices whose adapters it may come through."""
    rows = job.micro_batch * job.sequence * job.model.kv_heads // job.layout.tensor * job.product_bytes
    yield {"attention.key", "attention.key_value_up"}, rows * job.model.head_dim
    yield {"attention.value", "attention.key_value_up"}, rows * job.model.value_head_dim


def _to_experts(job: Job, forward: int, backward: bool) -> Some:
    mixture, layout = job.model.mixture, job.layout
    assert mixture is not None
    if mixture.balance_loss:
        together = layout.context * layout.tensor
        counts = job.micro_batch * mixture.experts * _FP32
        # All that is computed again asks for them again; of exchanges alone the results are kept (recomputation.py).
        times = 1 + (job.config.training.recompute != "none")
        yield Message("all_reduce", "sequence", together, counts), job.micro_batches * times
    yield Message("all_to_all", "expert", layout.expert, mixture.experts * _INT64), job.micro_batches * forward
    rows = job.own_tokens * mixture.top_k * job.model.hidden_size * job.product_bytes
    # There and back, and the gradients of both.
    yield Message("all_to_all", "expert", layout.expert, rows), job.micro_batches * 2 * (forward + backward)


def _ends(job: Job) -> Some:
    """Around the blocks: the embedding's rows and the loss, whose vocabulary is cut."""
    predicts = job.predicts_further
    tokens = job.tokens * job.model.hidden_size * job.product_bytes
    embedded = job.micro_batches * (job.has_first + predicts)
    rows = job.tokens * job.model.hidden_size * _FP32
    yield _tensor(job, "reduce_scatter", rows), embedded
    yield _tensor(job, "all_gather", rows), embedded * gradients.of_matrices(job)
    if not job.has_last:
        return
    losses = job.micro_batches * (1 + predicts)
    yield _tensor(job, "all_gather", tokens), losses
    yield _tensor(job, "reduce_scatter", tokens), losses * job.learns
    if job.config.preference is not None:  # log-probabilities and lengths of a pair's answers
        pairs = 2 * job.micro_batch * 2 * _FP32
        yield Message("all_reduce", "context", job.layout.context, pairs), losses
    at_once = rows_at_once(job)
    # Of each row a maximum, then its sum and the label's logit; `zili.ops.distillation` has its own.
    values = (2, 3, 2) if job.teacher is not None else (1, 2)
    for start in range(0, job.tokens if job.learns else 0, at_once):
        rows = min(at_once, job.tokens - start)
        for each in values:
            yield _tensor(job, "all_reduce", each * rows * _FP32), losses


def rows_at_once(job: Job) -> int:
    """Of logits: the loss is computed so many tokens at a time."""
    elements = _LOGITS[job.on_host] // (_ALIVE if job.teacher is not None else 1)
    return max(_LEAST_ROWS, elements // (job.model.vocab_size // job.layout.tensor))


def _stages(job: Job) -> Some:
    """Between the stages of a pipeline: hidden states one way, their gradients the other."""
    size = job.own_tokens * job.model.hidden_size * _FP32
    last = job.config.parallel.stages - 1
    numbers = job.stage_numbers
    for number in numbers:
        for other in (number - 1, number + 1):
            if 0 <= other <= last and other not in numbers:
                # Forward one way and back the other; a teacher's goes forward alone.
                kinds = ("send", "receive") if job.learns else ("send" if other > number else "receive",)
                for kind in kinds:
                    yield Message(kind, "pipeline", job.layout.pipeline, size), job.micro_batches
    shared = job.model.tied_embeddings or job.model.mtp_layers
    if shared and gradients.of_matrices(job) and job.layout.pipeline > 1 and (job.has_first or job.has_last):
        rows = -(-job.model.vocab_size // job.layout.tensor // job.layout.weight_shards)
        for kind in ("send", "receive"):
            yield Message(kind, "pipeline", job.layout.pipeline, rows * job.model.hidden_size * _FP32), 1


def _weights(job: Job) -> Some:
    """Weights gathered for use, gradients summed and cut; then summed over replicas."""
    layout = job.layout
    for group in (group for group in weight_groups(job) if not group.whole):
        mesh = "expert_shards" if group.of_experts else "weight_shards"
        shards = getattr(layout, mesh)
        size = group.pieces(shards) * shards
        # A pipeline gathers once a step; else a block lets go after each forward pass.
        gathers = 1 if layout.pipeline > 1 else job.micro_batches * (1 if group.stays else 2)
        if not job.learns and layout.pipeline == 1:  # nothing gives back what stays
            gathers = 0 if group.stays else job.micro_batches
        if layout.pipeline > 1 or group.used:
            yield Message("all_gather", mesh, shards, size * (_FP32 if group.in_fp32 else job.product_bytes)), gathers
        learned = group.pieces(shards, learned=True) * shards
        if learned:
            yield Message("reduce_scatter", mesh, shards, learned * _FP32), job.micro_batches if job.sums_each else 1
            yield Message("all_reduce", "replicas", layout.replicas, learned // shards * _FP32), 1


def _whole_gradients(job: Job) -> Some:
    """What tensor-parallel processes hold whole has terms of its gradient in each; and so has what all hold whole."""
    for group in weight_groups(job):
        # Gradients of several micro-batches are added up in fp32 first.
        once = job.adds_up or group.whole
        bytes_each, times = _FP32 if once or group.in_fp32 else job.product_bytes, 1 if once else job.micro_batches
        for parameter in () if group.of_experts else group.parameters:
            if parameter.cut is None and parameter.learned:
                yield _tensor(job, "all_reduce", prod(parameter.shape) * bytes_each), times
    for stage in job.stages:
        for size in _buckets(job, stage):
            yield Message("all_reduce", "replicas", job.layout.replicas, size), 1
            yield Message("all_reduce", "weight_shards", job.layout.weight_shards, size), 1


def _buckets(job: Job, stage: range) -> Iterator[int]:
    """Bytes of gradients of a stage's whole weights, as they are summed together: by `zili.parallel.data._buckets`."""
    size = 0
    for group in stage_groups(job, stage):
        for parameter in group.parameters if group.whole else ():
            size += prod(parameter.shape) * _FP32 * parameter.learned
            if size >= _BUCKET:
                yield size
                size = 0
    if size:
        yield size


def _figures(job: Job) -> Some:
    """Sums over the world: loss, targets, norm; and what experts were given."""
    world = job.layout.world
    further = 3 if job.config.preference is not None else job.learns_further
    if job.teacher is not None:
        further = 2
    yield Message("all_reduce", "world", world, (3 + further + _REQUESTS) * _FP32), 1
    mixture = job.model.mixture
    if mixture is not None:
        layers = job.model.layers + job.model.mtp_layers
        yield Message("all_reduce", "world", world, layers * mixture.experts * _FP32), 1
