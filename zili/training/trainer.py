"""The loop: batch, forward, backward, clip, step; then the callbacks."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zili import __version__, ops
from zili.chips.device import Device
from zili.config import RunConfig
from zili.config.run import Precision
from zili.data.loader import Batch, Loader
from zili.data.prefetch import Prefetcher
from zili.errors import CheckpointError, TrainingError
from zili.models.arithmetic import training_flops_per_token
from zili.models.decoder import Decoder
from zili.training import checkpoints
from zili.training.callbacks.base import Callback, StepRecord
from zili.training.interruption import Interruption
from zili.training.optimizers import build_optimizers, set_learning_rate
from zili.training.schedules import learning_rate_share
from zili.training.throughput import matmul_peak

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DATA_ORDER = ("seed", "training.global_batch", "training.sequence_length", "data.sources")


class Trainer:
    """One run on one device, from the first step or from its newest sound checkpoint.

    `config` is resolved: nothing in it is left to "auto" (`zili.training.setup.resolve`).
    """

    def __init__(self, config: RunConfig, loader: Loader, device: Device, callbacks: Sequence[Callback] = ()) -> None:
        self.config = config
        self.loader = loader
        self.device = device
        self.callbacks = callbacks
        self.step = 0
        self.interrupted = False
        self.model = _build_model(config, device)
        self.optimizers = build_optimizers(self.model, config.optimizer)
        assert config.chip.precision != "auto", "the configuration is resolved"
        self._dtype = DTYPES[config.chip.precision]
        self.matmul_peak = matmul_peak(device, self._dtype)
        self._saved_at: int | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        device.seed(config.seed)  # dropout's; after the measurement, which draws numbers too
        self._flops_per_token = training_flops_per_token(config.model, config.training.sequence_length)

    @property
    def checkpoint_folder(self) -> Path:
        return self.config.folder / "checkpoints"

    @property
    def tokens(self) -> int:
        """Tokens consumed since the beginning of the run."""
        return self.step * self.config.training.global_batch * self.config.training.sequence_length

    @property
    def done(self) -> bool:
        return self.step >= self.config.training.steps

    @staticmethod
    def uncompiled() -> Any:
        """Context in which the model's blocks run eagerly, for batches of other shapes than training's.

        A compiled block would be compiled again for each shape, which takes longer than it saves.
        """
        return torch.compiler.set_stance("force_eager")

    def note(self, text: str) -> None:
        """Tell the user one line, through whatever shows and records the run."""
        for callback in self.callbacks:
            callback.on_note(text)

    def resume(self) -> bool:
        """Go to the newest sound checkpoint of the run folder, if there is one.

        Raises:
            CheckpointError: every checkpoint is damaged, or they belong to another model, optimizer or data order.
        """
        found = checkpoints.newest_sound(self.checkpoint_folder, self.note)
        if found is None:
            return False
        state = checkpoints.read_state(found)
        self._check_belongs(found, state)
        checkpoints.set_aside_after(found)
        rng = checkpoints.restore(found, self.model, self.optimizers)
        if not self.device.set_rng_state(rng):
            self.note(f"{found} was written on another kind of device: dropout draws other numbers from here on")
        self.step = self._saved_at = state.step
        self.note(f"resumed from {found} at step {state.step}")
        return True

    def save(self) -> Path:
        """Write a checkpoint of the present step.

        Raises:
            ZiliError: the last step left weights that are no longer finite numbers.
        """
        if self._last is not None:
            self._refuse_non_finite(*self._last)
        state = checkpoints.RunState(
            step=self.step,
            samples=self.step * self.config.training.global_batch,
            config=self.config.model_dump(mode="json"),
            data_fingerprint=self.loader.fingerprint(),
            operations=ops.chosen(),
            versions={"zili": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )
        path = checkpoints.save(
            self.checkpoint_folder,
            state,
            self.model,
            self.optimizers,
            self.device.rng_state(),
            keep=self.config.checkpoint.keep,
        )
        self._saved_at = self.step
        for callback in self.callbacks:
            callback.on_checkpoint(self)
        return path

    def fit(self) -> None:
        """Train to `training.steps`, or until interrupted; a checkpoint is written either way.

        Raises:
            TrainingError: the loss or the gradient is no longer a finite number.
        """
        self.model.train()
        for callback in self.callbacks:
            callback.on_start(self)
        depth = self.config.data.prefetch
        with Interruption() as interruption:
            with Prefetcher(self.loader, start=self.step, depth=depth) as batches:
                while not self.done and not interruption.requested:
                    self._one_step(batches)
                    if self.config.checkpoint.every and self.step % self.config.checkpoint.every == 0:
                        self.save()
            self.interrupted = interruption.requested and not self.done
            if self._saved_at != self.step:
                self.save()
        for callback in self.callbacks:
            callback.on_end(self)

    def _one_step(self, batches: Prefetcher) -> None:
        started, waited = time.perf_counter(), batches.waited
        share = learning_rate_share(self.step, self.config.training.steps, self.config.schedule)
        _, batch = next(batches)
        loss, norm = self.train_step(batch)
        if self.step % self.config.logging.every == 0 or self.done:
            record = self._record(loss, norm, share, started, batches.waited - waited)
            self._refuse_non_finite(loss, norm)
            for callback in self.callbacks:
                callback.on_step(self, record)
        for callback in self.callbacks:
            callback.after_step(self)

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimizer step on one global batch; returns mean loss and gradient norm before clipping, 0-d."""
        share = learning_rate_share(self.step, self.config.training.steps, self.config.schedule)
        set_learning_rate(self.optimizers, share)
        loss = self._accumulate(batch)
        norm = self._clip()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._last = loss, norm
        return loss, norm

    def _accumulate(self, batch: Batch) -> Tensor:
        """Backward over the whole batch in micro-batches; returns the mean loss, a 0-d fp32 tensor."""
        targets = int((batch.labels != ops.IGNORE_INDEX).sum())
        micro = self.config.training.micro_batch
        assert isinstance(micro, int), "the configuration is resolved"
        total = torch.zeros((), device=self.device.type)
        for part in zip(*(field.split(micro) for field in batch), strict=True):
            input_ids, labels, document_ids = (tensor.to(self.device.type, non_blocking=True) for tensor in part)
            with self.autocast():
                loss = self.model.loss_sum(input_ids, labels, document_ids=document_ids) / max(targets, 1)
            loss.backward()
            total += loss.detach()
        return total

    def autocast(self) -> Any:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def _clip(self) -> Tensor:
        limit = self.config.optimizer.clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def _record(self, loss: Tensor, norm: Tensor, share: float, started: float, waited: float) -> StepRecord:
        loss_value, norm_value = float(loss), float(norm)  # waits for the device, so the clock is read after
        seconds = time.perf_counter() - started
        tokens = self.config.training.global_batch * self.config.training.sequence_length
        return StepRecord(
            step=self.step,
            tokens=self.tokens,
            loss=loss_value,
            learning_rate=self.config.optimizer.learning_rate * share,
            gradient_norm=norm_value,
            step_seconds=seconds,
            data_seconds=waited,
            tokens_per_second=tokens / seconds,
            matmul_share=tokens * self._flops_per_token / seconds / self.matmul_peak,
        )

    def _refuse_non_finite(self, loss: Tensor, norm: Tensor) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        kept = checkpoints.list_checkpoints(self.checkpoint_folder)
        way_out = f"the newest checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        raise TrainingError(
            f"step {self.step}: loss {float(loss)}, gradient norm {float(norm)}; {way_out}. "
            "Lower optimizer.learning_rate, or lengthen schedule.warmup_steps"
        )

    def _check_belongs(self, path: Path, state: checkpoints.RunState) -> None:
        """Refuse to go on with another model or another order of data than the checkpoint's."""
        there, here = state.config, self.config.model_dump(mode="json")
        shape = _differences(there, here, [f"model.{key}" for key in here["model"]])
        if shape:
            raise CheckpointError(f"{path} is of another shape: {shape}; match it, or give the run another folder")
        same_data = state.data_fingerprint == self.loader.fingerprint()
        if not same_data or there["training"]["global_batch"] != here["training"]["global_batch"]:
            order = _differences(there, here, _DATA_ORDER) or "the token stores hold other tokens"
            raise CheckpointError(
                f"{path} was trained on other data, or on the same in another order: {order}; "
                "restore it, or give the run another folder"
            )


def _differences(there: dict[str, Any], here: dict[str, Any], keys: Iterable[str]) -> str:
    """`seed 0 there, 1 here, ...` of the dotted keys in which two configurations differ."""
    pairs = [(key, _at(there, key), _at(here, key)) for key in keys]
    return ", ".join(f"{key} {old} there, {new} here" for key, old, new in pairs if old != new)


def _at(config: dict[str, Any], key: str) -> Any:
    return reduce(lambda table, part: table.get(part, {}), key.split("."), config)


def _build_model(config: RunConfig, device: Device) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config.model)
    model.to_empty(device=device.type)
    model.init_weights(config.seed)
    model.recompute = config.training.recompute
    if config.chip.compile:
        for block in model.layers:
            # One graph serves every block of the same shape, so the first costs the time of all.
            block.compile(dynamic=False)
    return model
