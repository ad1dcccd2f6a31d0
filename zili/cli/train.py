"""`zili train`: run a recipe, or go on with it."""

from __future__ import annotations

import shlex

import typer
from rich.console import Console

from zili import api
from zili.cli.amounts import amounts
from zili.cli.ending import INTERRUPTED
from zili.cli.options import Overrides, Recipe, training
from zili.cli.output import print_next, print_opened
from zili.parallel.layout import processes
from zili.plurals import counted
from zili.runs.recipes import read_recipe


def train(
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """Train a recipe to its last step, from the newest checkpoint of its run folder if there is one."""
    console = Console(quiet=processes()[0] > 0)  # the first process speaks for all
    config = read_recipe(recipe, overrides or ())
    # Loading torch takes seconds; whoever waits sees first that the recipe is read.
    if not console.quiet:
        for number, amount in enumerate(amounts(config)):
            text = ("  " if number else "") + amount.text
            console.print(text, highlight=False, markup=False, soft_wrap=True, style="yellow" if amount.warns else None)
        console.print("opening the chip and choosing among its operations", highlight=False)
    opened = api.setup(config)
    print_opened(opened.choices, opened.loader.report, console)
    trainer = api.train(opened)
    folder = config.folder
    if trainer.interrupted:
        from zili.training.interruption import ignore_repeats

        ignore_repeats()
        console.print(f"Stopped at step {trainer.step}; the checkpoint is written. Go on with:", highlight=False)
        recipe_file = shlex.quote(str(folder / "recipe.toml"))
        console.print(f"  {training()} {recipe_file}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    console.print(
        f"Done: {counted(trainer.step, 'step')}, {counted(trainer.tokens, 'token')}, in {folder}. Next:",
        highlight=False,
    )
    print_next(folder, console)
