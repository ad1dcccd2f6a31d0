"""`zili launch`: train under supervision, on one machine or on many."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import zili
from zili.cli.options import Overrides, Recipe
from zili.config import RunConfig
from zili.errors import ConfigError
from zili.runs.recipes import read_recipe


class _RecipeFirst(TyperGroup):
    """A group whose first word may be a recipe: then it is to be run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_RecipeFirst, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _group() -> None:
    """Train under supervision."""


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on each machine.")] = 1,
    machines: Annotated[str, typer.Option(help="How many machines work: COUNT, or LEAST:MOST.")] = "1",
    host: Annotated[str, typer.Option(help="Where other machines reach this one; listened at.")] = "127.0.0.1",
    machine: Annotated[str | None, typer.Option(help="Name of this machine, else its host name.")] = None,
    spares: Annotated[int, typer.Option(min=0, help="Machines that stand by, warm, to take the place of one.")] = 0,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a missing machine before going on with fewer.")
    ] = 60,
    patience: Annotated[
        float, typer.Option(min=0.1, help="Seconds without progress that are never a hang; longer steps allow more.")
    ] = 60,
    metrics: Annotated[
        str | None,
        typer.Option(help="Serve figures for Prometheus at PORT (0: a free one) or HOST:PORT; else on loopback."),
    ] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Begin every process anew, and fork no warm one.")] = False,
) -> None:
    """Train a recipe as `zili train` does, on several processes, and begin them anew when something breaks.

    On several machines start the same command on each, with `--machines` and `--host`. `zili launch drain MACHINE RUN`
    takes a machine out of a run.
    """
    config = read_recipe(recipe, overrides or ())
    from zili import chips
    from zili.exposition import place_of_endpoint, refuse_missing_client, serving
    from zili.supervision.agent import Agent, ThisMachine
    from zili.supervision.elastic import layouts
    from zili.supervision.figures import MachineFigures
    from zili.supervision.folder import SupervisionFolder
    from zili.supervision.nursery import COMPILES
    from zili.supervision.state import Launch

    least, most = _counts(machines)
    _refuse_endless(wait=wait, patience=patience)
    place = None if metrics is None else place_of_endpoint(metrics)
    if place is not None:
        refuse_missing_client()
    words = ["train", str(recipe), *(word for text in overrides or () for word in ("--set", text))]
    chip = chips.choose(config.chip.name).backend
    identity = identity_of(config, chip.name, processes, f"{least}:{most}")
    name = machine or socket.gethostname()
    folder = SupervisionFolder(config.folder)
    keys = {str(count): changed for count, changed in layouts(config, processes, least, most).items()}
    watch = config.watch.model_dump(mode="json")
    job = Launch(words, processes, most, keys, spares, wait, patience, watch)
    here = ThisMachine(name, host, chip.name, cold, identity)

    if config.chip.compile is True and chip.device_type == "cpu":  # not tried on a chip: Triton may open one
        os.environ[COMPILES] = "1"

    async def supervise(own: Path) -> int:
        agent = Agent(folder, own, job, here, show)
        with serving(MachineFigures(config.folder, chip.name, agent.pace, lambda: agent.state), place, show):
            return await agent.run()

    with folder.machine(name) as own:
        raise typer.Exit(asyncio.run(supervise(own)))


@app.command()
def drain(
    machine: Annotated[str, typer.Argument(help="Name of the machine, as the run's supervisors have it.")],
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
) -> None:
    """Take a machine out of a run after its next step: a spare takes its place, or the run goes on with fewer."""
    from zili.supervision.folder import SupervisionFolder, ask_root

    if not (run_folder / "supervision").is_dir():
        raise ConfigError(f"{run_folder} is no run that `zili launch` has begun")
    Console().print(ask_root(SupervisionFolder(run_folder), {"drain": machine}), highlight=False, soft_wrap=True)


@app.command("try-out", hidden=True)
def try_out(
    chip: Annotated[str, typer.Argument(help="Backend.")],
    host: Annotated[str, typer.Option(help="As of a run.")] = "127.0.0.1",
) -> None:
    """Use the device of this process for a moment, as a supervisor has each of its processes do before a run."""
    from zili.supervision import tryout

    tryout.try_out(chip, host)


def identity_of(config: RunConfig, chip: str, processes: int, machines: str) -> dict[str, str]:
    """What has to be equal on all machines of a run, by name. A root on any of them goes by what that one was told."""
    recipe = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return {
        "Zili": zili.__version__,
        "torch": version("torch"),
        "recipe": hashlib.sha256(recipe.encode()).hexdigest()[:12],
        "data": hashlib.sha256("".join(map(_contents, _stores(config))).encode()).hexdigest()[:12],
        **{"chip": chip, "--processes": str(processes), "--machines": machines},
    }


def _stores(config: RunConfig) -> list[Path]:
    return [*(source.store for source in config.data.sources), *filter(None, [config.data.held_out])]


def _contents(store: Path) -> str:
    """What a token store's manifest says of its files; its content is hashed when a life begins."""
    try:
        return json.dumps(json.loads(Path(f"{store}.json").read_text(encoding="utf-8"))["files"], sort_keys=True)
    except (OSError, ValueError, LookupError, TypeError):
        return f"{store} cannot be read"


def show(text: str) -> None:
    """Tell a person. A terminal that is gone, or a pipe that nobody reads any more, ends no run."""
    try:
        print(f"zili launch: {text}", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _counts(text: str) -> tuple[int, int]:
    """`4` or `3:5` as the least and the most."""
    least, _, most = text.partition(":")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = 0, 0
    if not 0 < found[0] <= found[1]:
        raise ConfigError(f"--machines {text}: give a number, or LEAST:MOST")
    return found


def _refuse_endless(**options: float) -> None:
    for option, seconds in options.items():
        if not math.isfinite(seconds):
            raise ConfigError(f"--{option} {seconds}: give seconds")
