"""Memory of a chip in published runs, whose frameworks keep other things than this one (`planning.exact.memory`).

States by ZeRO stage (Rajbhandari et al. 2020), activations by Korthikanti et al. 2022 with fused attention, in flight
by schedule (Narayanan et al. 2021). What a device reports beside what tensors ask for depends on how it was asked.
"""

from __future__ import annotations

from zili.models.arithmetic import kinds_of_layers
from zili.planning.exact.weights import held
from zili.planning.fitted.step_time import stored
from zili.planning.run import Run

_GIB = 2**30
CONTEXT = 1.5
"""GiB that a device reports beside what the framework's allocator has: runtime, libraries' workspaces, buffers of
collectives. Fitted to FlagPerf's rows."""
GAPS = 0.08
"""What an allocator has reserved beyond what tensors took at most, as a share of what is given and taken."""
_HALF = 0.42
"""Of what a layer keeps, where every other product's result is computed again. Fitted to torchtitan's rows."""


def memory_gib(run: Run, definition: str) -> float:
    """GiB of the fullest chip; `definition` says what was measured, in a table's words."""
    states, live = state_bytes(run), activation_bytes(run)
    text = definition.lower()
    if "allocated" in text:
        return (states + live) / _GIB
    if "device" in text or "published" in text or not text:
        return (states + live * (1 + GAPS)) / _GIB + CONTEXT
    return (states + live * (1 + GAPS)) / _GIB


def state_bytes(run: Run) -> float:
    """Weights, gradients and optimizer."""
    total = sum(held(run.model, run.tensor, run.pipeline, run.expert))
    if run.weight_shards == 1:
        # Weights in 16 bits, gradients in fp32 or as they are made; fp32 weights and both moments, cut where they are.
        gradients = 2 if run.software.early else 4
        return total * (2 + gradients) + 12 * stored(run, run.state_shards)
    # fp32 weights, gradients and moments, all cut. Two layers are gathered at a time; in a pipeline all of them, and
    # gradients are added up whole.
    gathered = 6 * total if run.pipeline > 1 else 2 * 2 * total / run.model.layers
    return 16 * stored(run, run.weight_shards) + gathered


def activation_bytes(run: Run) -> float:
    """What micro-batches in flight keep on a pipeline's first process, or its last with the logits."""
    model = run.model
    rows, own = run.rows, run.rows / run.tensor
    layers = model.layers / run.pipeline
    each = sum(times * _layer_bytes(run, layer) for layer, times in kinds_of_layers(model)) / model.layers
    whole = each
    if run.recompute == "full":
        each = 2 * (own if run.software.sequence_parallel else rows) * model.hidden_size
    elif run.recompute == "half":
        each *= _HALF
    # In 16 bits and in fp32, and a gradient each, where no kernel keeps them; Megatron's loss works in place.
    logits = (16 if run.weight_shards > 1 else 8) * rows * model.vocab_size / run.tensor
    if run.pipeline > 1 and run.weight_shards > 1:
        # torch's pipeline hands back the last stage's outputs of all micro-batches.
        logits *= 1 + (run.micro_batches - 1) / 4
    if run.pipeline == 1:
        return layers * each + (whole if run.recompute == "full" else 0) + logits
    flight = min(run.micro_batches, run.pipeline)
    if run.virtual > 1:
        flight = min(run.micro_batches, run.pipeline * (1 + (run.pipeline - 1) / (run.pipeline * run.virtual)))
    again = whole if run.recompute == "full" else 0.0
    return max(flight * layers * each + again, layers * each + again + logits)


def _layer_bytes(run: Run, layer: int) -> float:
    """What one micro-batch keeps in one layer, nothing computed again."""
    model, rows, own = run.model, run.rows, run.rows / run.tensor
    hidden = model.hidden_size
    between = own if run.software.sequence_parallel else rows
    # Two norms' inputs and outputs, and the inputs of both pairs of products; queries, keys, values and the output.
    total = 8 * between * hidden + 2 * rows / run.tensor * (2 * model.heads + 2 * model.kv_heads) * model.head_dim
    if not run.software.fused_attention:
        total += 5 * model.heads / run.tensor * run.micro_batch * run.sequence**2
    if model.has_experts(layer):
        mixture = model.mixture
        assert mixture is not None
        rows_of_experts = own * mixture.top_k
        total += 4 * rows_of_experts * hidden
        total += 8 * own * (mixture.top_k + mixture.shared_experts) * mixture.ffn_hidden_size
    else:
        total += 6 * rows * model.ffn_hidden_size / run.tensor
    return total
