"""The parts of `zili.diagnosis.device_check`: each examines one thing on a chip, in a process of its own.

A part takes the backend's name and what hears its findings, one at a time, so that those made before a crash are kept.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from zili import chips, ops
from zili.chips.device import Device
from zili.config import RunConfig
from zili.diagnosis.findings import Finding, Severity
from zili.diagnosis.made_up_runs import DENSE, MIXTURE, MadeUpTokens, made_up_trainer, run_config, trainer_of
from zili.models.decoder import Decoder
from zili.ops import registry
from zili.release.layouts.mapping import PublishedTensors
from zili.release.opening import LAYOUTS, load, open_model
from zili.release.tensors import HeldTensors
from zili.training.callbacks import Callback, StepRecord
from zili.training.setup import set_up

Note = Callable[[Finding], None]
GOLDENS = Path(__file__).parent / "goldens"
"""Tiny models in published layouts, and what they must compute: tests/release/make_goldens.py."""
_LIMITS = {"logits": 1e-4, "loss": 1e-5, "gradients": 1e-4, "loss in bf16": 0.03}
"""What may be off: logits and loss absolute, gradients of the largest, the loss in bf16 of the loss. In fp32 other
frameworks are off by a tenth of it and less, products in tf32 by ten times as much; the CPU's bf16 by 0.01."""
_FOLLOWS = 1e-3
"""Relative: what losses may differ by in fp32 after a run moved. Another chip's rounding makes 1e-6 of it."""
_MEMORY, _ROOMY = 0.1, 24 << 30
"""Relative, what a rehearsal's memory may be off before it is said; and bytes free, of a chip with room."""
_STRETCH = 3
"""Steps of a run before it moves."""
_OFFENCES = 12


def goldens(chip: str, note: Note) -> None:
    """Logits, loss and gradients of tiny published models, with the operations that a run would take."""
    device = _opened(chip)
    ops.choose(device.type, "fp32", {}, (), device.backend.operations, device.lacking())
    for folder in sorted(path for path in GOLDENS.iterdir() if path.is_dir()):
        note(_golden(folder, device))


def _opened(chip: str) -> Device:
    return Device(chips.activate(chips.choose(chip).backend))


def _golden(folder: Path, device: Device) -> Finding:
    expected = load_file(folder / "golden.safetensors")
    model = load(folder, device=device.torch)
    ids = expected["input_ids"].to(device.torch)
    apart = {"logits": float((model(ids).detach().cpu() - expected["logits"]).abs().max())}
    loss = _mean_loss(model, ids)
    loss.backward()
    apart["loss"] = abs(float(loss.detach()) - float(expected["loss"]))
    apart["gradients"] = _gradients_apart(model, folder, expected)
    if device.capability("bf16").value:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            apart["loss in bf16"] = abs(float(_mean_loss(model, ids)) / float(expected["loss"]) - 1)
    # Not `>`: of nan, neither holds.
    wrong = [name for name, value in apart.items() if not value <= _LIMITS[name]]
    seen = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
    if not wrong:
        return Finding("goldens", folder.name, Severity.GOOD, f"{seen} apart", figures=apart)
    limits = ", ".join(f"{name} {_LIMITS[name]:g}" for name in wrong)
    fix = "`zili align` names the operation; if products are in tf32 or the like by default, turn that off"
    return Finding("goldens", folder.name, Severity.BROKEN, f"{seen} apart; the most is {limits}", fix, apart)


def _mean_loss(model: Decoder, ids: Tensor) -> Tensor:
    """The mean loss of the tokens after the first. All positions go in: some rotary rules depend on the length."""
    labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], ops.IGNORE_INDEX)), dim=1)
    return model.loss_sum(ids, labels) / (ids.numel() - len(ids))


def _gradients_apart(model: Decoder, folder: Path, expected: dict[str, Tensor]) -> float:
    """The largest difference: of each gradient that is there, over its largest element, and of the norm of all."""
    own = {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in own.values()))
    apart = [abs(norm / float(expected["gradient_norm"]) - 1)]
    origin = open_model(folder).origin
    assert origin is not None
    layout = next(layout for layout in LAYOUTS if layout.name == origin.layout)
    published = PublishedTensors(HeldTensors(own), layout.rules(model.config, origin.variant))
    for name, gradient in expected.items():
        if name.startswith("grad."):
            off = published.read(name.removeprefix("grad.")) - gradient
            apart.append(float(off.abs().max() / gradient.abs().max()))
    return math.nan if any(map(math.isnan, apart)) else max(apart)


def _align(model: dict[str, Any], name: str) -> Callable[[str, Note], None]:
    """Every operation of a few training steps of `model`, in bf16 where the chip has it, against the CPU."""

    def aligned(chip: str, note: Note) -> None:
        from zili.diagnosis.align import align as compare

        device = _opened(chip)
        if device.type == "cpu":
            note(Finding("align", name, Severity.FALLBACK, "the CPU would be compared with itself"))
            return
        precision = _precision(device)
        config = run_config(model, device.backend.name, f"chip.precision={precision}", "training.micro_batch=4")
        result = compare(config, 2, MadeUpTokens(config))
        calls = sum(seen.calls for seen in result.seen.values())
        last, cpus = result.losses[-1]
        seen = f"{calls:,} operations of {len(result.seen)} kinds in {precision}; loss {last:.6f}, the CPU's {cpus:.6f}"
        figures = {"operations": float(calls), "outside": float(len(result.offences)), "loss": last, "CPU's loss": cpus}
        if result.first is None:
            note(Finding("align", name, Severity.GOOD, f"{seen}; all within their bands", figures=figures))
            return
        seen = f"{seen}; {len(result.offences)} outside of their bands"
        note(Finding("align", name, Severity.BROKEN, seen, "update the plugin or driver", figures))
        for number, offence in enumerate(result.offences[:_OFFENCES], 1):
            note(Finding("align", f"{name}: {number}", Severity.BROKEN, str(offence)))

    return aligned


align_dense = _align(DENSE, "dense")
align_mixture = _align(MIXTURE, "mixture")


def _precision(device: Device) -> str:
    return "bf16" if device.capability("bf16").value else "fp32"


def memory(chip: str, note: Note) -> None:
    """Compares the allocator's peak during a step with the rehearsed one."""
    device = _opened(chip)
    if device.memory() is None:
        note(Finding("peak memory", "all", Severity.FALLBACK, f"{device.name()} does not say how much is allocated"))
        return
    for name, model in (("dense", DENSE), ("mixture", MIXTURE)):
        note(_peak(name, _large_run(model, device)))


def _large_run(model: dict[str, Any], device: Device) -> RunConfig:
    """So large, where there is room, that what libraries keep for their own work is little beside it."""
    given = device.memory()
    roomy = given is not None and given["free"] > _ROOMY
    layers, vocabulary, length, rows = (16, 65536, 1024, 16) if roomy else (4, 8192, 128, 8)
    sizes = {"layers": layers, "vocab_size": vocabulary, "max_length": length}
    batch = (f"training.global_batch={rows}", f"training.micro_batch={rows // 2}", f"training.sequence_length={length}")
    precision = f"chip.precision={_precision(device)}"
    return run_config({**model, **sizes}, device.backend.name, *batch, precision)


def _peak(name: str, config: RunConfig) -> Finding:
    from zili.rehearsal import rehearse

    setup = set_up(config)
    device = setup.device
    gc.collect()  # models before it, which refer to themselves
    before = _allocated(device)["allocated"]
    trainer = trainer_of(setup)
    trainer.parallel.train()
    trainer.train_step(trainer.loader.batch(0))  # makes the optimizer's moments
    device.synchronize()
    torch.accelerator.reset_peak_memory_stats(device.torch)
    trainer.train_step(trainer.loader.batch(1))
    device.synchronize()
    given = _allocated(device)["peak"] - before
    del trainer
    said = rehearse(config, 1, backend=device.backend, micro_batches=2).peak.bytes
    off = said / given - 1
    seen = f"{given / 2**20:,.1f} MiB given, {said / 2**20:,.1f} MiB rehearsed ({off:+.1%})"
    figures = {"given bytes": float(given), "rehearsed bytes": float(said)}
    if abs(off) <= _MEMORY:
        return Finding("peak memory", name, Severity.GOOD, seen, figures=figures)
    why = "an attention that is not one kernel keeps its scores, which a rehearsal does not count"
    return Finding("peak memory", name, Severity.FALLBACK, seen, why, figures)


def _allocated(device: Device) -> dict[str, int]:
    found = device.memory()
    assert found is not None, "it said so a moment ago"
    return found


def moved(chip: str, note: Note) -> None:
    """A run that goes from the chip to the CPU and back by its checkpoints, beside one that stays on the CPU.

    By the plain operations: what others do is compared elsewhere, and both places are to compute the same.
    """
    name = _opened(chip).backend.name
    with tempfile.TemporaryDirectory() as folder:
        stays = _losses(["cpu"] * 3, Path(folder) / "stays")
        moves = _losses([name, "cpu", name], Path(folder) / "moves")
    apart = max(abs(own - cpus) / abs(cpus) for own, cpus in zip(moves, stays, strict=True))
    seen = f"{name}, CPU, {name}, {_STRETCH} steps each: losses within {apart:.1e} of a run on the CPU"
    seen += f", from {moves[0]:.4f} to {moves[-1]:.4f}"
    if apart <= _FOLLOWS:
        note(Finding("resume", "dense", Severity.GOOD, seen, figures={"relative difference": apart}))
    else:
        fix = "`zili align` names the first operation that is wrong"
        note(Finding("resume", "dense", Severity.BROKEN, seen, fix, {"relative difference": apart}))


class _Losses(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_step(self, trainer: Any, record: StepRecord) -> None:
        self.found.append(record.loss)


def _losses(places: list[str], folder: Path) -> list[float]:
    """Losses of a run that goes on, in `folder`, on one backend after the other."""
    heard = _Losses()
    plain = [f"chip.operations.{name}={registry.REFERENCE}" for name in registry.OPERATIONS]
    for number, chip in enumerate(places, 1):
        trainer = made_up_trainer(run_config(DENSE, chip, f"training.steps={number * _STRETCH}", *plain, folder=folder))
        trainer.callbacks = [heard]
        assert trainer.resume() == (number > 1)
        trainer.fit()
    return heard.found
