"""`zili config`: what a recipe means once everything is decided."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from zili.chips import find_backend
from zili.chips.catalog import find_chip
from zili.cli.amounts import amounts
from zili.cli.options import MOST_CHIPS, AsJson, Overrides, Recipe
from zili.cli.output import console, table
from zili.config import ModelConfig, RunConfig, dump_recipe, load_preset, preset_names
from zili.config.key_list import key_list
from zili.errors import ChipError, ConfigError, LayoutError
from zili.parallel.layout import lay_out, processes
from zili.plurals import counted
from zili.runs.recipes import read_recipe

app = typer.Typer(no_args_is_help=True, help="Show what a recipe means, list presets.")


@app.command()
def show(
    recipe: Recipe,
    chips: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_CHIPS, help="Lay the recipe out over so many chips, without opening one."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print a recipe with every default filled in. Comments say what it amounts to, and why each choice was made.

    If the recipe can run here, what depends on the chips is chosen too; otherwise it stays open.
    """
    written = read_recipe(recipe, overrides or ())
    config, reasons = _laid_out(written, chips) if chips else _resolved(written)
    for amount in amounts(written):
        typer.echo(f"# {amount.text}")
    for line in reasons:
        typer.echo("\n".join(f"# {part}" for part in line.splitlines()))
    typer.echo(dump_recipe(config), nl=False)


def _laid_out(config: RunConfig, chips: int) -> tuple[RunConfig, list[str]]:
    layout = lay_out(config, chips)
    found = {"shards": layout.shards, "stages_per_process": config.parallel.stages_each}
    line = f'{counted(chips, "chip")}: {layout}; what is left to "auto" is chosen on them'
    return config.changed(parallel=found), [line, *_unknown_chips(config)]


def _unknown_chips(config: RunConfig) -> list[str]:
    """What is said of names that no chip has; the chips themselves may be elsewhere."""
    said = []
    for name, find in ((config.chip.name, find_backend), (config.chip.model, find_chip)):
        try:
            if name not in (None, "auto"):
                find(name)
        except ChipError as error:
            said.append(str(error))
    return said


def _resolved(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The recipe as it would run here; or as it is, with the reason why it cannot."""
    try:
        lay_out(config, processes()[1])
        from zili.training.setup import set_up

        setup = set_up(config)
    except (LayoutError, ChipError, ConfigError) as error:
        return config, [f'what is left to "auto" stays open, since this does not run here as it is: {error}']
    return setup.config, [str(choice) for choice in setup.choices]


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the model presets with their parameter counts."""
    from zili.models.arithmetic import count_parameters

    if as_json:
        models = {name: ModelConfig.model_validate(load_preset(name)) for name in preset_names()}
        shapes = {
            name: {**model.model_dump(mode="json"), "parameters": count_parameters(model).total}
            for name, model in models.items()
        }
        typer.echo(json.dumps(shapes, indent=1))
        return
    to = console()
    columns = ("preset", "layers", "hidden", "heads/kv", "FFN", "vocabulary", "parameters")
    rows = table(to, columns, left=columns[:1])
    for name in preset_names():
        model = ModelConfig.model_validate(load_preset(name))
        heads = f"{model.heads}/{model.kv_heads}"
        sizes = (model.layers, model.hidden_size, heads, model.ffn_hidden_size, model.vocab_size)
        rows.add_row(name, *map(str, sizes), f"{count_parameters(model).total:,}")
    to.print(rows, highlight=False)


@app.command(name="reference")
def reference() -> None:
    """Print every key with its type, default and meaning, as docs/configuration.md holds it."""
    typer.echo(key_list(), nl=False)
