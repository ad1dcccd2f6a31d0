"""From a validated recipe to a run that can start: everything left to "auto" is chosen here, with its reason."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zili import chips
from zili.chips.device import Device
from zili.chips.host_memory import available_bytes
from zili.config import Choice, RunConfig
from zili.config.model import ModelConfig
from zili.config.run import ChipConfig, Precision
from zili.errors import ChipError, ConfigError
from zili.models.arithmetic import training_flops_per_token
from zili.parallel.control.member import AGENT, HELD_BYTES
from zili.parallel.layout import Layout, lay_out, processes
from zili.planning.exact.job import Job
from zili.planning.exact.memory import (
    STATES_IN_MEMORY,
    fullest,
    may_sum_each,
    reducing,
    saved_bytes,
    usable,
    with_reduce,
)
from zili.plurals import counted
from zili.user_cache import keep_what_is_compiled

if TYPE_CHECKING:
    from zili.ops.timings import Timings
    from zili.parallel.world import World
    from zili.training.checkpoints import RunState

_GIB = 2**30
_AUTO_SHARE = 0.7
_COMPILED_SAVES = 0.08
"""Share of the steps' time, on the CPU: docs/benchmarks.md."""
_COMPILING = 20.0
"""Seconds for one kind of block that nothing is kept of. What is kept costs less, but two equal runs decide alike."""
_SHARE_OF_PRODUCT = 0.5
"""What an eager step reaches of the rate of a large product."""
_FOR_STATES = 0.5
"""Share of the host's free memory that states of processes may take: others need some too."""
_KEPT = "as in the run's checkpoint, so that its numbers stay the same bits"


@dataclass(frozen=True)
class Setup:
    """A configuration with nothing left to choose, what it runs on, and the reason of each choice."""

    config: RunConfig
    device: Device
    world: World
    choices: tuple[Choice, ...]


def set_up(config: RunConfig) -> Setup:
    """Activate the chip, join the other processes, and resolve the configuration. Imports torch, after the environment
    is set.

    The first process chooses for all. A run that has checkpoints keeps the versions of operations and the micro-batch
    it was using, so that its numbers stay the same bits.

    Raises:
        LayoutError: the layout does not fit the world, the model or the batch.
        ChipError: the chip is not here or lacks what the recipe asks for.
        ConfigError: the run cannot fit into memory.
    """
    _, size, here = processes()
    layout = lay_out(config, size)
    selection = chips.choose(config.chip.name)
    if config.chip.compile:
        keep_what_is_compiled()
    activation = chips.activate(selection.backend, index=here, deterministic=config.chip.deterministic)

    import torch

    from zili import ops
    from zili.ops.timings import Timings
    from zili.parallel.world import World, join

    device = Device(activation, config.chip.capabilities)
    if config.chip.deterministic and not (can := device.capability("deterministic")).value:
        raise ChipError(f"{device.name()} does not repeat bit by bit ({can.reason}); unset chip.deterministic")
    if config.chip.threads:
        torch.set_num_threads(config.chip.threads)
    join(device)
    world = World(layout, device)
    started = [Choice("chip.name", device.backend.name, selection.reason), *_environment(activation)]
    resolved, choices = world.from_first(lambda: resolve(config, layout, device))
    lay_out(resolved, size)
    resolved, choice = world.from_first(lambda: _with_room_for_copies(job_here(resolved, layout, device)))
    choices = [*choices, *choice]
    if not world.is_first:
        versions = {c.name.rpartition(".")[2]: c.value for c in choices if c.name.startswith("chip.operations.")}
        unused = [name for name in ops.chosen() if name not in versions]
        vendor, lacking = device.backend.operations, device.lacking()
        precision = resolved.chip.precision
        assert precision != "auto", "the first process has chosen"
        timings = Timings.of(device, precision)
        ops.choose(device.type, precision, versions, unused, vendor, lacking, timings)
    return Setup(resolved, device, world, (*started, *choices))


def resolve(config: RunConfig, layout: Layout, device: Device) -> tuple[RunConfig, list[Choice]]:
    from zili import ops
    from zili.ops.registry import OF_EXPERTS
    from zili.ops.timings import Timings
    from zili.ops.versions import EAGER
    from zili.training.tiers.choosing import newest_state_of

    state = newest_state_of(config, device)
    precision, why_precision = _precision(config.chip, device, state)
    timings = Timings.of(device, precision)
    previous = _on_this_chip(state, device, precision)
    compiled, why_compiled = _compile(config, layout, device, state, precision, timings)
    chip = {"name": device.backend.name, "precision": precision, "compile": compiled}
    config, fitted = _fitted(config.changed(chip=chip), layout, device, previous)
    choices = [
        Choice("chip.precision", precision, why_precision),
        Choice("chip.compile", str(compiled).lower(), why_compiled),
        *fitted,
    ]
    if config.parallel.shards == "auto":
        choices.append(
            Choice(
                "parallel.shards",
                str(layout.shards),
                f"what is left of {counted(layout.world, 'process')}",
            )
        )
    choices += [*_fallbacks(config.model, layout, device, precision), _watched(config, device)]
    unused = () if config.model.mixture else OF_EXPERTS
    lacking = device.lacking() | ({EAGER: "blocks are compiled, which fuses it"} if compiled else {})
    own, kept = config.chip.operations, _kept_operations(previous, device, precision)
    asked, vendor = {**kept, **own}, device.backend.operations
    choices += [
        Choice(f"chip.operations.{name}", version, _KEPT if name in kept.keys() - own else why)
        for name, version, why in ops.choose(device.type, precision, asked, unused, vendor, lacking, timings)
    ]
    if timings.problem is not None:
        choices.append(Choice("timings", "this run's own", timings.problem))
    parallel = {"shards": layout.shards, "stages_per_process": config.parallel.stages_each}
    return config.changed(parallel=parallel), choices


def _fallbacks(model: ModelConfig, layout: Layout, device: Device, precision: Precision) -> list[Choice]:
    """What this run does otherwise because the chip lacks it; precision, compile and operations say so themselves."""
    concerned = {
        "fsdp2": layout.world > 1 and layout.weight_shards * layout.replicas > 1,
        "bf16_reduce": precision == "bf16" and layout.tensor * layout.context > 1,
        "fused_adamw": True,
        "grouped_heads_attention": model.kv_heads < model.heads,
        "inf_nan": True,
    }
    return [
        Choice(f"chip.capabilities.{name}", "false", f"{reason}; {chips.CAPABILITIES[name].otherwise}")
        for name, reason in device.lacking().items()
        if concerned.get(name)
    ]


def _watched(config: RunConfig, device: Device) -> Choice:
    """Whether steps are judged, and what that costs."""
    watch = config.watch
    if not watch.judges:
        return Choice("watch", "what is logged or saved", "[watch] leaves out no batch; what is no number ends the run")
    value = f"every step, non_finite {watch.non_finite}, spike {watch.spike}"
    fused = device.capability("fused_adamw").value and config.optimizer.name == "adamw"
    how = "AdamW's kernel leaves an update out by itself; nothing waits"
    if not fused:
        how = "each update waits until its figures are read: only AdamW's fused kernel leaves one out by itself"
    return Choice("watch", value, f"as [watch] says; {how}")


def _environment(activation: chips.Activation) -> list[Choice]:
    """What was set for the vendor's software, what the user had set already, and what came too late."""
    choices = [Choice(f"environment.{setting.name}", setting.value, setting.reason) for setting in activation.applied]
    choices += [Choice(f"environment.{setting.name}", setting.value, "your own value") for setting in activation.kept]
    choices += [Choice("environment", "late", warning) for warning in activation.warnings]
    if activation.process:
        choices.append(Choice("environment.malloc", "keeps freed blocks", activation.process))
    return choices


def _on_this_chip(state: RunState | None, device: Device, precision: Precision) -> RunState | None:
    """The run's newest checkpoint, where it was made on this kind of device and in this precision."""
    chip = _table(state, "chip")
    return state if (chip.get("name"), chip.get("precision")) == (device.backend.name, precision) else None


def _table(state: RunState | None, name: str) -> dict[str, Any]:
    """One table of a checkpoint's configuration; empty where there is none, or no checkpoint."""
    found = state.config.get(name) if state else None
    return found if isinstance(found, dict) else {}


def _kept_operations(previous: RunState | None, device: Device, precision: Precision) -> dict[str, str]:
    """The versions `previous` was made with, as far as this version of Zili has them to choose among."""
    from zili import ops
    from zili.ops.registry import OF_EXPERTS, REFERENCE

    vendor = device.backend.operations
    several = {version.operation for version in ops.versions(vendor)}
    if previous and not _table(previous, "model").get("mixture"):
        several -= set(OF_EXPERTS)
    return {
        name: version
        for name, version in (previous.operations if previous else {}).items()
        if name in several and (version == REFERENCE or ops.runs_on(name, version, device.type, precision, vendor))
    }


def _precision(chip: ChipConfig, device: Device, state: RunState | None) -> tuple[Precision, str]:
    """What was asked for; else the run's own, since its numbers depend on it; else bf16 if the chip has it."""
    bf16 = device.capability("bf16")
    can = bf16.value or device.type == "cpu"  # slower, but every CPU computes in bf16
    if chip.precision != "auto":
        if chip.precision == "bf16" and not can:
            raise ChipError(f'{device.name()} has no bf16 ({bf16.reason}); set chip.precision = "fp32"')
        return chip.precision, "asked for"
    kept = _table(state, "chip").get("precision")
    if kept == "fp32" or (kept == "bf16" and can):
        return kept, _KEPT if kept == "fp32" or bf16.value else f"{_KEPT}; {bf16.reason}"
    if not bf16.value:
        return "fp32", bf16.reason if kept is None else f"{bf16.reason}; the run's checkpoint is in {kept}"
    if device.type != "cpu":
        return "bf16", bf16.reason
    from zili.ops.lowered import bf16_pays
    from zili.ops.timings import Timings

    pays, why = bf16_pays(Timings.of(device, "bf16"))
    return ("bf16" if pays else "fp32"), f"{bf16.reason}; {why}"


def _compile(
    config: RunConfig, layout: Layout, device: Device, state: RunState | None, precision: Precision, timings: Timings
) -> tuple[bool, str]:
    """Decided once a run: the checkpoint has it. A first run compiles where that will pay."""
    if config.chip.compile != "auto":
        return config.chip.compile, "asked for"
    can, kept = device.capability("compile"), _table(state, "chip")
    if not can.value:
        return False, f"{can.reason}; blocks run eagerly"
    if kept.get("name") == device.backend.name and isinstance(kept.get("compile"), bool):
        return kept["compile"], _KEPT
    seconds = _expected_seconds(config, layout, device, precision, timings)
    saved, cost = _COMPILED_SAVES * seconds, _COMPILING * _kinds_of_blocks(config)
    return saved > cost, f"about {seconds:,.0f} s of steps: it would save {saved:,.0f} s and cost {cost:.0f} s"


def _expected_seconds(
    config: RunConfig, layout: Layout, device: Device, precision: Precision, timings: Timings
) -> float:
    """Seconds of all steps, run eagerly: their FLOPs, at the share of a large product's rate that steps reach here."""
    from zili.training.throughput import matmul_peak
    from zili.training.trainer import DTYPES

    rate = timings.measured("product", lambda: matmul_peak(device, DTYPES[precision]))
    training = config.training
    tokens = training.steps * training.global_batch * training.sequence_length
    flops = tokens * training_flops_per_token(config.model, training.sequence_length)
    return flops / (rate * _SHARE_OF_PRODUCT * layout.world)


def _kinds_of_blocks(config: RunConfig) -> int:
    return len({config.model.has_experts(layer) for layer in range(config.model.layers)})


def _fitted(
    config: RunConfig, layout: Layout, device: Device, previous: RunState | None
) -> tuple[RunConfig, list[Choice]]:
    """`config` with its micro-batch, and when gradients are summed: as in the checkpoint, or the largest that fits.

    Raises:
        ConfigError: not even one sample fits; the message has the parts.
    """
    free = _free_bytes(device)
    room = math.inf if free is None else free
    asked = config.training.micro_batch
    jobs = [job_here(_with(config, size), layout, device) for size in _sizes(config, layout)]
    before = _kept_job(config, layout, device, previous)
    # Auto leaves a margin: evaluation needs room too, and of what is free others may want some.
    margin = room if asked != "auto" else _AUTO_SHARE * room
    kept = _fits(before, margin) if before is not None else None
    best = kept or next(filter(None, (_fits(job, margin) for job in reversed(jobs))), None) or _fits(jobs[0], room)
    if best is None:
        raise ConfigError(_too_large(jobs[0], device, room))
    there = "unknown free memory" if free is None else f"{free / _GIB:.1f} GiB free"
    text = f"about {sum(fullest(best).values()) / _GIB:.1f} GiB of {there}"
    if best is kept:
        text = _KEPT
    elif best.sums_each:
        text += "; gradients of whole weights would not fit"
    choices = [Choice("training.micro_batch", str(best.micro_batch), text if asked == "auto" else "asked for")]
    if config.parallel.reduce == "auto" and layout.world > 1:
        choices.append(Choice("parallel.reduce", best.config.parallel.reduce, text))
    return best.config, choices


def _sizes(config: RunConfig, layout: Layout) -> list[int]:
    """Micro-batches to choose among, the smallest first; at least as many of them as a pipeline has processes."""
    asked, batch = config.training.micro_batch, config.training.global_batch // layout.data
    if asked != "auto":
        return [asked]
    return [size for size in range(1, batch // layout.pipeline + 1) if batch % size == 0] or [1]


def _with(config: RunConfig, micro_batch: int) -> RunConfig:
    return config.changed(training={"micro_batch": micro_batch})


def _kept_job(config: RunConfig, layout: Layout, device: Device, previous: RunState | None) -> Job | None:
    """With what the run's checkpoint has, as far as that is left to us and is possible here."""
    micro = _table(previous, "training").get("micro_batch")
    if micro not in _sizes(config, layout):
        return None
    job = job_here(_with(config, micro), layout, device)
    reduce = _table(previous, "parallel").get("reduce", "auto")
    if config.parallel.reduce != "auto" or (reduce == "micro_batch" and not may_sum_each(job)):
        return job
    return reducing(job, reduce)


def job_here(config: RunConfig, layout: Layout, device: Device) -> Job:
    """What `zili.planning` says the memory of, here: on the host a save's copies are among it."""
    return Job(
        config,
        layout,
        sharded=device.capability("fsdp2").value,
        grouped_heads=device.capability("grouped_heads_attention").value,
        on_host=device.type == "cpu" and device.memory() is None,
    )


def _fits(job: Job, room: float) -> Job | None:
    """`job` as it fits into `room` bytes, or None."""
    settled = with_reduce(job, room)
    return settled if sum(fullest(settled).values()) <= room else None


def _too_large(job: Job, device: Device, room: float) -> str:
    parts = fullest(with_reduce(job, room))
    total = sum(parts.values())
    largest = sorted(((size, part) for part, size in parts.items() if size >= total / 50), reverse=True)
    return (
        f"this run needs about {total / _GIB:.1f} GiB ("
        + ", ".join(f"{part} {size / _GIB:.1f}" for size, part in largest)
        + f"; micro-batches of {job.micro_batch} x {job.sequence} tokens) and {device.name()} has "
        f"{room / _GIB:.1f} GiB free; take a smaller model, a shorter sequence, a smaller micro_batch or "
        'training.recompute = "full"'
    )


def _with_room_for_copies(job: Job) -> tuple[RunConfig, list[Choice]]:
    """The job's configuration, which keeps no states in memory where the host has no room for them.

    Raises:
        ConfigError: the host has no room for what is asked for; the first save would be late to find that out.
    """
    host, here = available_bytes(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    copies, kept = saved_bytes(job) * here, job.config.checkpoint
    if host is None:
        return job.config, []
    in_background = 0 if job.on_host else kept.copies  # on the host it is among what fits
    if in_background * copies > host:
        less = "leave out a tier of checkpoint.tiers, or " if kept.tiers else ""
        raise ConfigError(
            f"a save in the background copies {in_background * copies / _GIB:.1f} GiB of {counted(here, 'process')} to "
            f"the host, which has {host / _GIB:.1f} GiB; {less}set checkpoint.asynchronous = false"
        )
    host += int(os.environ.get(HELD_BYTES, "0"))  # what a life before left there is these states
    states = (STATES_IN_MEMORY + in_background) * copies
    if not kept.memory or AGENT not in os.environ or states <= _FOR_STATES * host:
        return job.config, []
    each = f"{STATES_IN_MEMORY} states of {counted(here, 'process')}"
    why = f"{each} take {states / _GIB:.1f} GiB of {host / _GIB:.1f} free"
    return job.config.changed(checkpoint={"memory": 0}), [Choice("checkpoint.memory", "0", why)]


def _free_bytes(device: Device) -> int | None:
    """What this process may take: what a plan would give it, if nobody else has it; of the host its share among the
    processes on this machine."""
    memory = device.memory()
    if memory is not None:
        return int(min(memory["free"], usable(memory["total"])))
    room = available_bytes()
    return None if room is None else int(usable(room)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
