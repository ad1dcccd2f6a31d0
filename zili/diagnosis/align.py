"""Finds where a chip's training step first differs from the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from zili import ops
from zili.config import RunConfig
from zili.config.parallel import ParallelConfig
from zili.data.loader import Batches
from zili.data.packing import DialogueLoader
from zili.data.prefetch import Prefetcher
from zili.diagnosis.shadow import Alignment, Shadow
from zili.durable import write_whole
from zili.errors import ConfigError
from zili.ops import registry
from zili.pages import render
from zili.runs.opening import open_trainer
from zili.training.reference_model import reference_of
from zili.training.trainer import Trainer

_LISTED = 200
"""Operations outside of their band that a page lists."""


def align(recipe: RunConfig, steps: int, loader: Batches | None = None) -> Alignment:
    """Train `steps` steps of `recipe` on the CPU, then on its chip with every operation checked.

    In one process, whatever the recipe's layout, without recomputation, and blocks run eagerly. A vendor's operations,
    which the CPU does not have, are compared with this house's references on the inputs of each call. `loader` is read
    in place of the recipe's data, if given.
    """
    # Recomputed blocks run in autograd's threads, where operations could not be told their modules.
    training = {"recompute": "none"}
    eager = recipe.changed(chip={"compile": False}, training=training, parallel=ParallelConfig())
    plain = dict.fromkeys(registry.OPERATIONS, registry.REFERENCE)
    # fp32 is what a chip is held against, unless the recipe names another precision for both.
    precision = "fp32" if eager.chip.precision == "auto" else eager.chip.precision
    on_cpu = eager.changed(chip={"name": "cpu", "operations": plain, "precision": precision})
    # The chip first: autograd makes a queue for each device that is there at its first backward pass, none later.
    trainer = open_trainer(eager, loader)
    if trainer.device.type == "cpu":
        raise ConfigError("the CPU would be compared with itself; name a chip with --set chip.name=NAME")
    versions = {name: registry.active(name) for name in registry.OPERATIONS}
    reference = _losses(open_trainer(on_cpu, loader), steps)
    shadow = Shadow(trainer.model, trainer.device.type)
    everywhere = {version.function for version in ops.versions()}
    vendors = {version.function for version in ops.versions(trainer.device.backend.operations)} - everywhere

    def watched(name: str, _: Callable[..., Any]) -> Callable[..., Any]:
        version = versions[name]
        return shadow.with_reference(name, version) if version in vendors else version

    with registry.replaced(watched):
        losses = _losses(trainer, steps, shadow)
    return Alignment(
        trainer.device.backend.name,
        list(zip(losses, reference, strict=True)),
        shadow.offences,
        shadow.seen,
        shadow.unchecked,
    )


def _losses(trainer: Trainer, steps: int, shadow: Shadow | None = None) -> list[float]:
    """Loss of each step; with a shadow every operation is checked."""
    loader = trainer.loader
    if isinstance(loader, DialogueLoader) and loader.pairs:
        loader.reference = reference_of(trainer, [loader])
    trainer.parallel.train()
    rows = trainer.world.rows(trainer.config.training.global_batch)
    losses = []
    with Prefetcher(trainer.loader, 0, rows, 2) as batches:
        for step in range(1, steps + 1):
            batch = next(batches)[1]
            if shadow is None:
                loss, _ = trainer.train_step(batch)
            else:
                shadow.step = step
                with shadow.watching():
                    loss, _ = trainer.train_step(batch)
            losses.append(float(loss))
    return losses


def page(result: Alignment, recipe: str) -> str:
    """An HTML page of `result`."""
    return render(
        "diagnosis/align.html.jinja",
        title=f"{result.chip} against the CPU",
        result=result,
        recipe=recipe,
        losses=[
            [i, f"{chip:.7g}", f"{cpu:.7g}", f"{abs(chip - cpu) / abs(cpu):.1e}"]
            for i, (chip, cpu) in enumerate(result.losses, 1)
        ],
        offences=[
            [o.operation, o.module, o.way, o.step, f"{list(o.shape)} {o.dtype}", o.distance]
            for o in result.offences[:_LISTED]
        ],
        seen=[
            [name, seen.calls, f"{seen.worst:.2f}"]
            for name, seen in sorted(result.seen.items(), key=lambda item: -item[1].worst)
        ],
    )


def write_page(result: Alignment, recipe: str, file: Path) -> None:
    """Write `page` to `file`, whole."""
    write_whole(file, page(result, recipe))
