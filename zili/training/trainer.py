"""The loop: batch, forward, backward, clip, step; then the callbacks. The same on one process and on many."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zili import __version__, ops
from zili.chips.device import Device
from zili.config import RunConfig
from zili.config.run import Precision
from zili.data.loader import Batch, Batches
from zili.data.prefetch import Prefetcher
from zili.errors import CheckpointError, TrainingError
from zili.models.arithmetic import parameter_shapes, training_flops_per_token
from zili.models.decoder import Decoder
from zili.objectives import Objective, Terms, objective_of
from zili.parallel.apply import Materialize, with_first_weights
from zili.parallel.control.crumbs import own_crumbs
from zili.parallel.layout import Layout
from zili.parallel.model import ParallelModel
from zili.parallel.world import World
from zili.plugins import place_of
from zili.training import checkpoints, restoring
from zili.training.belonging import state_that_belongs
from zili.training.callbacks.base import Callback, StepRecord
from zili.training.fence import generation_fence
from zili.training.held import StateMemory, restored_from_memory
from zili.training.interruption import Interruption
from zili.training.left_out import LeftOut, as_table, consumed, decisions_in, together
from zili.training.optimizers import build_optimizers, set_learning_rate
from zili.training.requests import Requests
from zili.training.restoring import Needs
from zili.training.rolling_back import RolledBack, act, go_back, known_decisions
from zili.training.run_clock import RunClock
from zili.training.saving import Saved, Saver
from zili.training.schedules import learning_rate_share
from zili.training.spikes import StepWatch, is_sound, update_unless
from zili.training.throughput import matmul_peak
from zili.training.tiers.choosing import newest_of, newest_offered, set_aside, tiers_of

_LOG = logging.getLogger(__name__)
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trainer:
    """One run, from the first step or from its newest sound checkpoint: this process's part of it.

    `config` is resolved: nothing in it is left to "auto" (`zili.training.setup.resolve`). `world` is the processes of
    the run; None is this one alone.
    """

    def __init__(
        self,
        config: RunConfig,
        loader: Batches,
        device: Device,
        callbacks: Sequence[Callback] = (),
        world: World | None = None,
        materialize: Materialize = with_first_weights,
        started: float | None = None,
        objective: Objective | None = None,
        decoder: type[Decoder] = Decoder,
    ) -> None:
        """`materialize` gives weights to a model that has shapes only; a rehearsal has no memory for them. `started`:
        what `time.monotonic` said when `training.hours` began; now, if not given. `objective`: what is learned in place
        of what the configuration says. `decoder`: the kind of model."""
        self.config = config
        self.loader = loader
        self.device = device
        self.decoder = decoder
        self.world = world or World(Layout(), device)
        self.callbacks = callbacks
        self.teacher_fingerprint = ""
        """Fingerprint of the weights that a teacher was given (`zili.runs.running.begin`)."""
        self.step = 0
        self.interrupted = False
        """Whether the run was stopped before its last step, to go on later: by a signal, or since its time is over."""
        self.watch = StepWatch(config.watch, device)
        """What judges the steps, and knows which batches are left out."""
        self._requests = Requests(self.world)
        self._told_to_stop = False
        self._begun = False
        """Whether a step was made: the first one warms up, which takes longer."""
        self._clock = RunClock(config, started)
        assert config.chip.precision != "auto", "the configuration is resolved"
        self._dtype = DTYPES[config.chip.precision]
        self.parallel = ParallelModel(
            config,
            self.world,
            self._dtype,
            objective or objective_of(config),
            materialize,
            targets_a_position=loader.learned_share,
            decoder=decoder,
        )
        fused = device.capability("fused_adamw").value
        self.optimizers = build_optimizers(list(self.parallel.named_parameters()), config.optimizer, self._dtype, fused)
        self.saver = self._made_saver()
        self._memory = StateMemory(self.world, config.checkpoint.memory, config.checkpoint.memory_share)
        self._saved_at: int | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._own: Terms | None = None
        self._agrees = self.world.layout.tensor == 1
        self._loads: Tensor | None = None
        self._further: dict[str, Tensor] = {}
        # Dropout's: each process drops other elements.
        device.seed(config.seed + self.world.rank)
        self._flops_per_token = training_flops_per_token(config.model, config.training.sequence_length)

    def _made_saver(self) -> Saver:
        kept = self.config.checkpoint
        return Saver(
            self.checkpoint_folder,
            self.world,
            keep=kept.keep,
            keep_every=kept.keep_every,
            every=kept.every,
            asynchronous=kept.asynchronous,
            patience=kept.patience,
            note=self.note,
            saved=self._tell_saved,
            fence=generation_fence(self.config.folder),
            tiers=tiers_of(self.config, self.world),
        )

    @property
    def model(self) -> Decoder:
        """The model; of a pipeline, this process's first stage."""
        return self.parallel.parts[0]

    @property
    def classes(self) -> dict[str, str]:
        """Importable names of what is learned and of the kind of model, which the recipe may not say."""
        return {"objective": place_of(type(self.parallel.objective)), "model": place_of(self.decoder)}

    @cached_property
    def matmul_peak(self) -> float:
        """FLOP/s of a large matrix product here, measured when it is first asked for."""
        return matmul_peak(self.device, self._dtype)

    @property
    def checkpoint_folder(self) -> Path:
        return self.config.folder / "checkpoints"

    @property
    def tokens(self) -> int:
        """Tokens consumed since the beginning of the run."""
        return self.step * self.config.training.global_batch * self.config.training.sequence_length

    @property
    def samples(self) -> int:
        """Samples of the data read since then, those of batches that were left out too."""
        return self.watch.position(self.step) * self.config.training.global_batch

    @property
    def done(self) -> bool:
        return self.step >= self.config.training.steps

    def uncompiled(self) -> Any:
        """Context in which the model's blocks run eagerly, for batches of other shapes than training's.

        A compiled block would be compiled again for each shape, which takes longer than it saves.
        """
        return torch.compiler.set_stance("force_eager") if self.config.chip.compile else nullcontext()

    def note(self, text: str) -> None:
        """Tell the user one line, through whatever shows and records the run.

        Only the first process has that. What others know and it does not, it must be told before (`World.count`).
        """
        _LOG.info(text)
        for callback in self.callbacks:
            callback.on_note(text)

    def stop(self, why: str) -> None:
        """End the run after the step at hand as after its last one; `why` is told to the user.

        For callbacks. One process may ask alone: all stop after the same step, which with several processes is the
        second from here (`Requests`). `interrupted` stays false, since the run has come to its end: `zili train` exits
        with 0.
        """
        self._requests.own["stop"] = True
        self.note(f"stopping after step {self.step + self._requests.delay}: {why}")

    def _tell_saved(self, saved: Saved) -> None:
        self._clock.save_took(saved.seconds)
        for callback in self.callbacks:
            callback.on_saved(saved)

    def resume(self, *, from_disk: bool = False) -> bool:
        """Go to the newest sound checkpoint of the run's folder and its other tiers, if there is one. A newer state in
        memory comes first, unless `from_disk`.

        Raises:
            CheckpointError: every checkpoint is damaged, or they belong to another model, optimizer, data order,
                teacher or objective.
        """
        world = self.world
        named = list(self.parallel.named_parameters())
        tensors = checkpoints.model_tensors(self.parallel.named_tensors())
        decisions = world.from_first(lambda: known_decisions(self))
        needs = Needs(tensors, named, world.rank)
        near = None if from_disk else self._memory.offered(tensors)
        if near is not None and near >= newest_offered(self.saver.tiers) and self._take_up(near, needs, decisions):
            return True
        chosen = newest_of(self.saver.tiers, needs, self.note, world, decisions)
        if near is not None and near > (chosen.step if chosen else 0) and self._take_up(near, needs, decisions):
            return True  # what is newer in the tiers is damaged
        self.watch.take_up(decisions)
        if chosen is None:
            self._memory.forget_after(0)
            return False
        found = chosen.found
        state = world.from_first(lambda: self._that_belongs(found.path, checkpoints.read_state(found.path)))
        set_aside(chosen, self.note)
        rng = world.agree(
            lambda: restoring.restore(found, self.config.model, tensors, named, self.optimizers, world.rank)
        )
        self._take_up_generators(f"{found.path}", rng)
        self.saver.found(chosen.step, chosen.holders)
        self._go_on_after(state, f"{found.path}", decisions)
        return True

    def _take_up(self, step: int, needs: Needs, decisions: Sequence[LeftOut]) -> bool:
        """Go on from the states of the life before, which are in memory; whether they could be."""
        world, config, (tensors, named, rank) = self.world, self.config.model, needs
        try:
            found, state = world.agree(lambda: self._memory.take_up(parameter_shapes(config)))
            world.agree(lambda: self._refuse_left_out(state, decisions))
            world.from_first(lambda: self._that_belongs(Path("memory"), state))
            rng = world.agree(lambda: restored_from_memory(found, config, tensors, named, self.optimizers, rank))
        except CheckpointError as error:  # on all processes, as they agreed
            self.note(f"{error}; going on from the newest checkpoint")
            return False
        self._take_up_generators("the state in memory", rng)
        self._go_on_after(state, "memory", decisions)
        return True

    def _refuse_left_out(self, state: checkpoints.RunState, decisions: Sequence[LeftOut]) -> None:
        if consumed(decisions, state.step, decisions_in(state.decisions)):
            raise CheckpointError(f"the state after step {state.step} in memory has read a batch that is left out")

    def _go_on_after(self, state: checkpoints.RunState, found: str, decisions: Sequence[LeftOut]) -> None:
        self.step, self._last = state.step, None
        self.watch.take_up(together(decisions_in(state.decisions), decisions), state.history)
        self._memory.forget_after(self.step)
        own_crumbs().resumed(self.step)
        self.note(f"resumed from {found} at step {self.step}")

    def _that_belongs(self, path: Path, state: checkpoints.RunState) -> checkpoints.RunState:
        data = self.loader.fingerprint()
        return state_that_belongs(path, state, self.config, data, self.teacher_fingerprint, self.classes)

    def _take_up_generators(self, found: str, rng: dict[str, Tensor]) -> None:
        """Go on drawing as the checkpoint says; which processes cannot, only they know themselves."""
        whole = bool(rng) and self.device.set_rng_state(rng)
        if not (self.config.model.hidden_dropout or self.config.model.attention_dropout):
            return
        new = self.world.count(not rng)
        moved = self.world.count(bool(rng) and not whole)
        for count, why in ((new, "by fewer processes"), (moved, "on another kind of device")):
            if count:
                where = f" in {count} of {self.world.size} processes" if self.world.size > 1 else ""
                self.note(f"{found} was written {why}: dropout draws other numbers{where} from here on")

    def save(self, *, everywhere: bool = True, last: bool = False) -> Path:
        """Begin to write a checkpoint of the present step, into all tiers or where it is due by its number; `fit`
        returns when it is whole. A tier that still writes another one is left out, but for the `last` of a run.

        Raises:
            ZiliError: the last step left weights that are no longer finite numbers.
            RolledBack: a step was bad, and the run is to go back.
        """
        act(self, everything=True)
        if self._last is not None:
            self._refuse_non_finite(*self._last)
        in_folder = everywhere or self.saver.due_in_folder(self.step)
        if in_folder:
            self._clock.save_began()
            self._saved_at = self.step
        with own_crumbs().within("save"):
            tensors, held = self.saved_tensors(), self._held_tensors()
            path = self.saver.save(self._state(), tensors, held, everywhere=everywhere, last=last)
        for callback in self.callbacks if in_folder else ():
            callback.on_checkpoint(self)
        return path

    def _state(self) -> checkpoints.RunState:
        """Where the run stands and what it is."""
        return checkpoints.RunState(
            step=self.step,
            samples=self.samples,
            config=self.config.model_dump(mode="json"),
            data_fingerprint=self.loader.fingerprint(),
            teacher_fingerprint=self.teacher_fingerprint,
            classes=self.classes,
            decisions=as_table(self.watch.decisions),
            history=[list(one) for one in self.watch.history],
            operations=ops.chosen(),
            versions={"zili": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )

    def _keep_in_memory(self) -> None:
        """Have this machine's agent hold the present state, if it is one to go on from."""
        assert self._last is not None
        act(self, everything=True)
        if is_sound(*map(float, self._last), saturates=not self.device.capability("inf_nan").value):
            with own_crumbs().within("copy"):
                line = self._memory.keep(self._state(), self._held_tensors())
            if line:
                self.note(line)

    def _held_tensors(self) -> dict[str, Tensor]:
        """All that this process has of the run's state, what others have too included."""
        named = list(self.parallel.named_parameters())
        return {
            **checkpoints.model_tensors(self.parallel.named_tensors()),
            **checkpoints.optimizer_tensors(named, self.optimizers),
            **self._generators(),
        }

    def _generators(self) -> dict[str, Tensor]:
        return {checkpoints.generator_key(k, self.world.rank): v for k, v in self.device.rng_state().items()}

    def saved_tensors(self) -> dict[str, Tensor]:
        """This process's part of a checkpoint, by name: weights, what the optimizers keep, generators."""
        # The last stage of a pipeline may have a copy of the embedding, which is the first's to save.
        second = self.parallel.is_second
        named = [(name, one) for name, one in self.parallel.named_parameters() if not second(name)]
        tensors = ((name, one) for name, one in self.parallel.named_tensors() if not second(name))
        return {
            **checkpoints.model_tensors(tensors),
            **checkpoints.optimizer_tensors(named, self.optimizers),
            **self._generators(),
        }

    def fit(self) -> None:
        """Train to `training.steps`, or until interrupted; a checkpoint is written either way.

        Raises:
            TrainingError: the loss or the gradient is no longer a finite number, or an objective takes a part of the
                vocabulary for the whole.
            CheckpointError: the last save failed, or `checkpoint.patience` of them in a row.
        """
        self.parallel.train()
        for callback in self.callbacks:
            callback.on_start(self)
        with Interruption() as interruption:
            while not self._run(interruption):
                pass
        own_crumbs().enter("end")
        for callback in self.callbacks:
            callback.on_end(self)

    def _run(self, interruption: Interruption) -> bool:
        """Steps up to the end or a stop, and the last checkpoint; False: a step was bad, and the run has gone back."""
        rows, depth = self.world.rows(self.config.training.global_batch), self.config.data.prefetch
        try:
            with Prefetcher(self.loader, self.step, rows, depth, self.watch.position) as batches:
                while not self.done and not self._stop(interruption):
                    act(self)
                    self._one_step(batches)
                    if self._memory.is_due(self.step):
                        self._keep_in_memory()
                    if self.saves_here:
                        self.save(everywhere=False)
            self.interrupted = not self.done and not self._told_to_stop
            if self.saver.lacks(self.step):
                self.save(last=True)
            with own_crumbs().within("save"):
                self.saver.wait()
        except RolledBack as bad:
            with own_crumbs().within("load"):
                go_back(self, bad.decision)
            return False
        return True

    @property
    def saves_here(self) -> bool:
        """Whether a checkpoint of this step is asked for, by number, in any tier."""
        return self.saver.due(self.step)

    def _stop(self, interruption: Interruption) -> bool:
        """Whether any process was interrupted or told to stop, or the time is over: all stop after the same step. A
        checkpoint that is due by the clock is begun.

        Raises:
            CheckpointError: too many saves in a row have failed.
        """
        self.saver.look()
        self._ask(interruption)
        due = self._requests.due()
        self._told_to_stop = "stop" in due
        if "give_up" in due:
            self.world.agree(self._give_up)
        if "over" in due and not due & {"interrupt", "stop"}:
            hours = self.config.training.hours
            self.note(f"stopping after step {self.step}: training.hours = {hours:g} leaves no time for another")
        elif "save" in due and "interrupt" not in due and self._saved_at != self.step and self.step:
            self.save()
        return bool(due & {"interrupt", "over", "stop"})

    def _ask(self, interruption: Interruption) -> None:
        """Put what this process wants of all into its next sum."""
        own, first = self._requests.own, self.world.is_first
        own["interrupt"], own["give_up"] = interruption.requested, self.saver.lost
        own["over"] = first and self._clock.time_is_over(self._own_bytes, self._requests.delay)
        own["save"] = first and self._clock.save_is_due()
        if own["save"]:
            self._clock.save_began()  # asked for once, although it begins steps later

    def _own_bytes(self) -> int:
        """About what this process has in a checkpoint: weights and two moments."""
        return 3 * sum(getattr(t, "to_local", lambda t=t: t)().nbytes for _, t in self.parallel.named_tensors())

    def _give_up(self) -> None:
        try:
            self.saver.wait()
        except CheckpointError as error:
            saves = f"{self.config.checkpoint.patience} saves in a row failed (checkpoint.patience)"
            raise CheckpointError(f"{saves}; the last: {error}") from error

    def _one_step(self, batches: Prefetcher) -> None:
        crumbs = own_crumbs()
        started, waited = time.perf_counter(), batches.waited
        crumbs.enter("data")
        share = learning_rate_share(self.step, self.config.training.steps, self.config.schedule)
        _, batch = next(batches)
        crumbs.enter("step" if self._begun else "warm_up")
        for callback in self.callbacks:
            callback.before_step(self, batch)
        loss, norm = self.train_step(batch)
        self._begun = True
        if not self._agrees:
            self._refuse_other_sums()
        if self.step % self.config.logging.every == 0 or self.done:
            record = self._record(loss, norm, share, started, batches.waited - waited)
            self._refuse_non_finite(loss, norm)
            # Figures that are no numbers are told with the decision on them.
            for callback in self.callbacks if math.isfinite(record.loss + record.gradient_norm) else ():
                callback.on_step(self, record)
        for callback in self.callbacks:
            callback.after_step(self)
        self._clock.after_step()
        crumbs.done(self.step)

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimizer step on this process's rows of a global batch.

        Returns mean loss and gradient norm before clipping, of the whole batch, 0-d.
        """
        share = learning_rate_share(self.step, self.config.training.steps, self.config.schedule)
        set_learning_rate(self.optimizers, share)
        self._own = self.parallel.accumulate(batch)
        self._memory.settle()
        if own_crumbs().takes("nan"):
            self._spoil_a_gradient()
        loss, norm = self._average(self._own)
        left_out = self.watch.judge(self.step, loss, norm)
        update_unless(self.optimizers, left_out)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self._loads = self.parallel.balance(left_out)
        self.step += 1
        self._last = loss, norm
        return loss, norm

    def _spoil_a_gradient(self) -> None:
        """A drill wants to see what follows."""
        next(one.grad for one in self.parallel.parameters() if one.grad is not None).mul_(math.nan)

    def _refuse_other_sums(self) -> None:
        """After the first step: whether the objective knows that vocabularies are cut."""
        assert self._own is not None
        if self.world.count(self.parallel.disagrees(self._own)):
            error = TrainingError(
                f"{type(self.parallel.objective).__name__}.terms gives another loss or figure on each process of "
                "parallel.tensor: outputs.logits() has a part of the vocabulary there, and outputs.hidden some of the "
                "tokens. Sum over the others by outputs.logsumexp, outputs.vocabulary.sum and outputs.total "
                "(docs/extending/loss.md), or set parallel.tensor = 1"
            )
            error.agreed = True  # the count is that of all processes
            raise error
        self._agrees = True

    def _average(self, own: Terms) -> tuple[Tensor, Tensor]:
        """Divide summed loss and gradients by the number of targets, and clip: one small sum over the world.

        Dividing at the end, and not each micro-batch by its own count, is what makes a step independent of how the
        batch was cut.
        """
        terms = (own.loss, own.count, self.parallel.squared_gradient(), *own.figures.values())
        summed = self.world.sum(torch.cat((torch.stack(terms), self._requests.terms())))
        loss, count, squared, *others = summed[: len(terms)]
        self._requests.take(summed[len(terms) :])
        count = count.clamp(min=1)
        norm = squared.sqrt() / count
        self._further = {name: total / count for name, total in zip(own.figures, others, strict=True)}
        limit = self.config.optimizer.clip or math.inf
        self.parallel.scale_gradients((limit / (norm + 1e-6)).clamp(max=1.0) / count)
        return loss / count, norm

    def _record(self, loss: Tensor, norm: Tensor, share: float, started: float, waited: float) -> StepRecord:
        loss_value, norm_value = float(loss), float(norm)  # waits for the device, so the clock is read after
        seconds = time.perf_counter() - started
        tokens = self.config.training.global_batch * self.config.training.sequence_length
        return StepRecord(
            step=self.step,
            tokens=self.tokens,
            samples=self.samples,
            loss=loss_value,
            learning_rate=self.config.optimizer.learning_rate * share,
            gradient_norm=norm_value,
            step_seconds=seconds,
            data_seconds=waited,
            tokens_per_second=tokens / seconds,
            memory_bytes=self.device.peak_memory(),
            further=further_figures(self._loads, self._further),
            matmul_share=tokens * self._flops_per_token / seconds / self.matmul_peak / self.world.size,
        )

    def _refuse_non_finite(self, loss: Tensor, norm: Tensor) -> None:
        """Where the recipe says no more: stop at a step that is looked at."""
        if self.config.watch.judges or is_sound(
            float(loss), float(norm), saturates=not self.device.capability("inf_nan").value
        ):
            return
        self.saver.settle()
        kept = checkpoints.list_checkpoints(self.checkpoint_folder)
        way_out = f"the newest checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        error = TrainingError(
            f"step {self.step}: loss {float(loss)}, gradient norm {float(norm)}; {way_out}. "
            "Lower optimizer.learning_rate, or lengthen schedule.warmup_steps"
        )
        error.agreed = True  # both numbers are sums over all processes
        raise error


def further_figures(loads: Tensor | None, means: dict[str, Tensor]) -> dict[str, float]:
    """What only some runs have: means over targets, and how evenly experts were used, from tokens an expert `[L, E]`,
    in the least even layer."""
    figures = {name: float(mean) for name, mean in means.items()}
    if loads is not None:
        loads = loads[loads.sum(1) > 0]  # multi-token prediction's may have no part in what is learned
    if loads is not None and len(loads):
        shares = loads / loads.mean(1, keepdim=True)
        figures |= {"expert_load_max": float(shares.max()), "expert_load_min": float(shares.min())}
    return figures
