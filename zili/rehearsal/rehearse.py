"""One step of a recipe as one of its processes."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from zili.chips.backend import Backend
from zili.chips.catalog import Chip
from zili.config import Choice, RunConfig
from zili.data.loader import Batch
from zili.errors import ConfigError, LayoutError
from zili.models.mixture import Experts
from zili.ops import registry
from zili.parallel.expert import ProcessExchange
from zili.parallel.layout import Layout, lay_out
from zili.parallel.model import plain
from zili.parallel.world import World
from zili.planning.exact.job import Job
from zili.planning.exact.memory import enough, usable, with_reduce
from zili.rehearsal import recorder as recording
from zili.rehearsal.fake_world import FakeWorld, RehearsedDevice, as_rank, evenly, without_memory
from zili.rehearsal.recorder import Recorder
from zili.rehearsal.result import Rehearsal, memory
from zili.rehearsal.stand_ins import FUSED, stand_in
from zili.training.setup import job_here, resolve
from zili.training.trainer import Trainer


def rehearse(
    config: RunConfig,
    world: int,
    rank: int = 0,
    *,
    backend: Backend,
    chip: Chip | None = None,
    micro_batches: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Rehearsal:
    """One step of `config`, optimizer included, as process `rank` of `world` on devices of `backend`.

    It has `micro_batches` of the step's, by default as many as memory depends on; memory is that of every step after
    the first, which begins with the optimizer's moments there. Blocks run eagerly. `progress` is told what it is at.

    Raises:
        LayoutError: the layout does not fit the world, the model or the batch, or there is no such process.
        ConfigError: the micro-batch is left to us and not one sample fits.
    """
    started = time.perf_counter()
    layout = lay_out(config, world)
    if not 0 <= rank < world:
        raise LayoutError(f"give 0 to {world - 1} as the process to be, not {rank}")
    on_host = backend.device_type == "cpu"
    with as_rank(rank, world, on_host=on_host) as mode:
        # The host's attention is none that a chip has.
        asked = config.chip.operations.get("attention")
        attention = asked or (registry.REFERENCE if on_host else FUSED)
        device, whole, choices = _decided(config, layout, backend, chip)
        resolved = _shortened(whole, layout, micro_batches)
        fake = FakeWorld(layout, device)
        progress(f"process {rank}: building its part of the model")
        trainer = Trainer(resolved, _NoData(), device, world=fake, materialize=without_memory(mode))  # type: ignore[arg-type]
        recorder = Recorder(_group_names(fake))
        _tell_micro_batches(trainer, f"process {rank}", Job(resolved, layout).micro_batches, progress)
        with mode, registry.replaced(stand_in(attention, on_host)):
            _step(trainer, recorder, whole.training.global_batch // layout.data, on_host)
    told = [str(choice) for choice in choices if "operations" not in choice.name] + [f"attention = {attention}"]
    return _rehearsal(rank, Job(resolved, layout, fake.pipeline_rank), recorder, told, time.perf_counter() - started)


def _decided(
    config: RunConfig, layout: Layout, backend: Backend, chip: Chip | None
) -> tuple[RehearsedDevice, RunConfig, Sequence[Choice]]:
    """The device, and `config` as it would be run on it, and why."""
    left_to_us = config.training.micro_batch == "auto"
    if left_to_us and chip is None:
        raise ConfigError("training.micro_batch is auto, and how much fits is the chip's to say: name it (--chip)")
    # One that is given is tried as it is: what fits is what a rehearsal finds out.
    device = RehearsedDevice(backend, chip if left_to_us else None, config.chip.capabilities)
    eager = _eagerly(config, device, backend.device_type == "cpu")
    if chip is not None and not left_to_us:
        eager = with_reduce(job_here(eager, layout, device), usable(1e9 * chip.require("memory_gb"))).config
    whole, choices = resolve(eager, layout, device)
    lay_out(whole, layout.world)
    return device, whole, choices


def _rehearsal(rank: int, job: Job, recorder: Recorder, choices: list[str], seconds: float) -> Rehearsal:
    """What was recorded."""
    peak, timeline = memory(recorder)
    return Rehearsal(
        rank,
        job.layout.world,
        str(job.layout),
        job.stage_numbers,
        [layer for stage in job.stages for layer in stage],
        job.micro_batches,
        peak,
        timeline,
        dict(recorder.messages),
        dict(recorder.flops),
        dict(recorder.operations.most_common()),
        seconds,
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        choices,
    )


def _tell_micro_batches(trainer: Trainer, who: str, count: int, progress: Callable[[str], None]) -> None:
    begun = 0

    def told(*_: object) -> None:
        nonlocal begun
        begun += 1
        progress(f"{who}: micro-batch {begun} of {count}")

    trainer.model.register_forward_pre_hook(told)


class _NoData:
    """A rehearsal's batches have shapes only."""

    learned_share = 1.0


def _eagerly(config: RunConfig, device: RehearsedDevice, on_host: bool) -> RunConfig:
    """`config` with decided what else would be measured on the machine, or is otherwise on the host."""
    versions = {"linear": "reference", "attention": "reference", "grouped_matmul": "grouped", **config.chip.operations}
    precision = config.chip.precision
    if precision == "auto":
        precision = "bf16" if device.capability("bf16").value and not on_host else "fp32"
    return config.changed(chip={"compile": False, "operations": versions, "precision": precision})


def _shortened(config: RunConfig, layout: Layout, micro_batches: int | None) -> RunConfig:
    """`config` with so many micro-batches in its global batch, or as many as memory depends on."""
    job = Job(config, layout)
    batch = min(job.micro_batches, micro_batches or enough(job)) * job.micro_batch * layout.data
    return config.changed(training={"global_batch": batch})


def _step(trainer: Trainer, recorder: Recorder, all_rows: int, on_host: bool) -> None:
    """A step of the rows in `trainer`'s batch; the others of its `all_rows` take their memory too."""
    trainer.parallel.train()
    for part in trainer.parallel.held:
        for module in part.modules():
            if isinstance(module, Experts) and isinstance(module.exchange, ProcessExchange):
                module.exchange.sizes = evenly
    _make_optimizer_state(trainer)
    rows = trainer.config.training.global_batch // trainer.world.layout.data
    ids = torch.zeros(rows, trainer.config.training.sequence_length, dtype=torch.long)
    batch = Batch(ids, ids.clone(), ids.int())
    if trainer.config.preference is not None:  # of one pair a row
        batch = batch._replace(reference=torch.zeros(rows, 2))
    others = [torch.zeros(all_rows - rows, *part.shape[1:], dtype=part.dtype) for part in batch if part is not None]
    recorder.is_for(recording.BATCH, (part for part in (*batch, *others) if part is not None))
    recorder.is_for(recording.WEIGHTS, (tensor for part in trainer.parallel.held for tensor in _held(part)))
    recorder.is_for(recording.OPTIMIZER, _state(trainer))
    sets = trainer.config.checkpoint.copies if on_host else 0
    copies = [torch.empty_like(plain(one)) for _ in range(sets) for one in trainer.saved_tensors().values()]
    recorder.is_for(recording.CHECKPOINT, copies)
    trainer.parallel.ask_teacher(batch)
    with recorder.recording():
        trainer.train_step(batch)


def _held(part: torch.nn.Module) -> Iterator[Tensor]:
    yield from part.parameters()
    yield from part.buffers()


def _make_optimizer_state(trainer: Trainer) -> None:
    """What the first step makes, by a step of nothing."""
    for parameter in trainer.parallel.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in trainer.optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _state(trainer: Trainer) -> Iterator[Tensor]:
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from (plain(value) for value in state.values() if isinstance(value, Tensor))


def _group_names(world: World) -> dict[str, str]:
    """What the processes of each group share; of names for the same group the first."""
    names: dict[str, str] = {}
    if world.size == 1:
        return names
    for name in ("pipeline", "tensor", "context", "expert", "weights", "expert_weights", "sequence"):
        mesh = world.mesh(name)
        for dimension in mesh.mesh_dim_names or ():
            names.setdefault(mesh.get_group(dimension).group_name, dimension)
    assert dist.group.WORLD is not None
    names[dist.group.WORLD.group_name] = world.layout.world_name
    return names
