"""The first run: its recipe, its text, and how it ends on time."""

from __future__ import annotations

import math
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from zili import chips
from zili.config import Choice, RunConfig, build_config, dump_recipe
from zili.durable import write_whole
from zili.errors import ConfigError, LayoutError
from zili.parallel.layout import processes
from zili.runs.recipes import RECIPE_FILE, read_recipe

if TYPE_CHECKING:
    from zili.data.prepare import Progress
    from zili.data.reading import OnError
    from zili.runs.opening import OpenedRun
    from zili.training.pacing import Pacer

_SECONDS_AFTER_TRAINING = 5
"""Kept for the last checkpoint, samples and the report, beside the last evaluation, whose time is measured."""
_EVALUATIONS = 3
"""Times the held-out text is scored, the last at the end."""
_DATA = "data"
_STEPS_A_MINUTE = 200
"""Until the steps that fit are known."""


@dataclass(frozen=True)
class Quickstart:
    """A quickstart as it was asked for."""

    folder: Path
    minutes: float
    """For everything, from text to report."""
    overrides: Sequence[str] = ()
    restart: bool = False
    """Drop an earlier run in the folder."""

    def refuse_early(self) -> None:
        """Find a mistyped override, an unknown chip or torchrun before minutes of reading text, and before an earlier
        run is dropped.

        Raises:
            ZiliError: what is wrong.
        """
        if processes()[1] > 1:
            raise LayoutError(
                "zili quickstart is one process: run it by itself, without torchrun; zili train takes many"
            )
        earlier = (self.folder / RECIPE_FILE).exists() and not self.restart
        recipe = read_recipe(self.folder, self.overrides) if earlier else self._new_recipe()
        if recipe.folder != self.folder:
            raise ConfigError(
                f"--set folder={recipe.folder} and the run folder {self.folder} differ; use --folder alone"
            )
        chips.choose(recipe.chip.name)

    def prepare(self, text: Sequence[Path], text_field: str, on_error: OnError, progress: Progress) -> list[str]:
        """Prepare the text in the run's folder; returns what was done, a line each. A run that has begun goes on with
        its own text or not at all.

        Raises:
            DataError: the text cannot be read, or is not the one that the run has learned from.
        """
        from zili.data.prepare import prepare

        def prepared(folder: Path, *, rebuild: bool) -> list[str]:
            made = prepare(
                text or None, folder, text_field=text_field, on_error=on_error, rebuild=rebuild, progress=progress
            )
            return made.lines

        data, said = self.folder / _DATA, []
        if self.restart and self.folder.exists():
            # The new text first: what cannot be read must not cost the earlier run.
            new = self.folder / f"{_DATA}.new"
            said = prepared(new, rebuild=True)
            self._drop()
            new.rename(data)
        begun = (self.folder / "checkpoints").exists()
        return [*said, *prepared(data, rebuild=not begun)]

    def _drop(self) -> None:
        """Remove what a run leaves, and nothing else that may lie in the folder."""
        for name in ("checkpoints", _DATA, "tokenizer", "tensorboard", "wandb", "swanlab"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in (RECIPE_FILE, "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"):
            (self.folder / name).unlink(missing_ok=True)

    def recipe(self) -> tuple[RunConfig, tuple[Choice, ...], bool]:
        """The run begun earlier in the folder, or a new one; why it has its length; whether that is found as it
        runs."""
        if (self.folder / RECIPE_FILE).exists():
            recipe = read_recipe(self.folder, self.overrides)
            steps = str(recipe.training.steps)
            own = Choice("training.steps", steps, "the run's own; --minutes counts for a new run")
            return recipe, (own,), False
        recipe = self._new_recipe()
        if any(override.split("=")[0].strip() == "training.steps" for override in self.overrides):
            return recipe, (), False
        reason = f"--minutes {self.minutes:g}; found while it runs"
        return recipe, (Choice("training.steps", "as many as fit", reason),), True

    def _new_recipe(self) -> RunConfig:
        from zili.data.prepare import data_table

        steps = math.ceil(_STEPS_A_MINUTE * self.minutes)
        table = tomllib.loads((resources.files("zili.config") / "quickstart.toml").read_text(encoding="utf-8"))
        table["folder"] = str(self.folder)
        table["training"]["steps"] = steps
        table["evaluation"]["every"] = math.ceil(steps / _EVALUATIONS)
        table["data"] = data_table(self.folder / _DATA)
        return build_config(table, self.overrides, origin="quickstart")

    def pacer(self, opened: OpenedRun, started: float) -> Pacer:
        """What ends the run on time, counted from `started`, as `time.perf_counter` told it."""
        from zili.data.store import TokenStore
        from zili.evaluation.during_training import seconds_of
        from zili.training.pacing import Pacer

        deadline = started + 60 * self.minutes - _SECONDS_AFTER_TRAINING
        found = Pacer(deadline, lambda config: _keep_length(opened.recipe, config))
        held_out = opened.recipe.data.held_out
        if held_out is not None:
            found.expect(seconds_of(TokenStore.open(held_out), opened.tokenizer))
        return found


def _keep_length(recipe: RunConfig, config: RunConfig) -> None:
    """Write `recipe` into its run folder with the length that the run `config` has found for itself."""
    found = recipe.changed(training={"steps": config.training.steps}, schedule=config.schedule)
    write_whole(recipe.folder / RECIPE_FILE, dump_recipe(found))
