"""`zili config`: what a recipe means once everything is decided."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from zili.cli.options import Overrides, read_recipe
from zili.config import ModelConfig, dump_recipe, load_preset, preset_names
from zili.config.reference import reference

app = typer.Typer(no_args_is_help=True, help="Show what a recipe means, list presets.")


@app.command()
def show(recipe: Annotated[Path, typer.Argument(help="TOML recipe.")], overrides: Overrides = None) -> None:
    """Print the resolved configuration, and the reason of every automatic choice as comments."""
    from zili.training.setup import set_up

    setup = set_up(read_recipe(recipe, overrides))
    for choice in setup.choices:
        typer.echo(f"# {choice}")
    typer.echo(dump_recipe(setup.config), nl=False)


@app.command()
def presets() -> None:
    """List the model presets with their parameter counts."""
    from zili.models.arithmetic import count_parameters

    table = Table("preset", "layers", "hidden", "heads/kv", "FFN", "vocabulary", "parameters", box=None, padding=(0, 1))
    for name in preset_names():
        model = ModelConfig.model_validate(load_preset(name))
        heads = f"{model.heads}/{model.kv_heads}"
        sizes = (model.layers, model.hidden_size, heads, model.ffn_hidden_size, model.vocab_size)
        table.add_row(name, *map(str, sizes), f"{count_parameters(model).total:,}")
    Console().print(table, highlight=False)


@app.command(name="reference")
def reference_() -> None:
    """Print the reference of every key, as docs/configuration.md holds it."""
    typer.echo(reference(), nl=False)
