"""`zili train`: run a recipe, or go on with it."""

from __future__ import annotations

import shlex

import typer
from rich.console import Console

from zili.cli.amounts import amounts
from zili.cli.options import Overrides, Recipe, read_recipe, starter
from zili.parallel.layout import processes
from zili.plurals import counted

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it (128 + SIGINT)."""


def train(
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """Train a recipe to its last step, from the newest checkpoint of its run folder if there is one."""
    from zili.cli.launch import prepare_launch, print_choices, print_next, run
    from zili.training.interruption import ignore_repeats

    console = Console(quiet=processes()[0] > 0)  # the first process speaks for all
    config = read_recipe(recipe, overrides)
    # Loading torch takes seconds; whoever waits sees first that the recipe is read.
    if not console.quiet:
        for number, amount in enumerate(amounts(config)):
            text = ("  " if number else "") + amount.text
            console.print(text, highlight=False, markup=False, soft_wrap=True, style="yellow" if amount.warns else None)
        console.print("opening the chip and choosing among its operations", highlight=False)
    launch = prepare_launch(config)
    print_choices(launch.choices, console)
    trainer = run(launch, console)
    folder = launch.recipe.folder
    if trainer.interrupted:
        ignore_repeats()
        console.print(f"Stopped at step {trainer.step}; the checkpoint is written. Go on with:", highlight=False)
        recipe_file = shlex.quote(str(folder / "recipe.toml"))
        console.print(f"  {starter()} train {recipe_file}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    console.print(
        f"Done: {counted(trainer.step, 'step')}, {counted(trainer.tokens, 'token')}, in {folder}. Next:",
        highlight=False,
    )
    print_next(folder, console)
