"""`zili serve`: OpenAI's API on a model of yours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import urlsplit

import typer

from zili.cli.options import Chip, Demo, ModelPath, Template, dtype_named, finite, model_at
from zili.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from zili.serving.generate.engine import Engine
    from zili.serving.handover import Offer


class Engines(StrEnum):
    """Who answers."""

    zili = "zili"
    vllm = "vllm"


AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(help="Web page whose scripts may ask, as https://chat.example.org; * is any. May be repeated."),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(help="Name by which who needs no key may ask on this machine, as chat.example.org. May be repeated."),
]


def serve(
    path: ModelPath = None,
    *,
    demo: Demo = False,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What the model is called; its folder's name by default.")] = None,
    template: Template = None,
    keys: Annotated[
        Path | None, typer.Option(help="TOML file of keys and their limits; whoever asks needs one.")
    ] = None,
    slots: Annotated[
        int, typer.Option(help="Answers at once, as far as memory has room; further ones wait.", min=1)
    ] = 16,
    context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer; the model's by default.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32 (ours by default) for weights and products.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Answers that may wait; further ones are refused.", min=1)] = 256,
    timeout: Annotated[
        float, typer.Option(help="Seconds an answer may take, its waiting included.", min=1, callback=finite)
    ] = 600,
    allow_origin: AllowOrigin = None,
    allow_host: AllowHost = None,
    engine: Annotated[
        Engines, typer.Option(help="vllm: hand a released folder to vLLM, with the right arguments.")
    ] = Engines.zili,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="With vllm: run Python code of the folder that is not Zili's.")
    ] = False,
    chip: Chip = "auto",
) -> None:
    """Answer over HTTP as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models, /tokenize."""
    if path is None and not demo:
        raise typer.BadParameter("give a model, or --demo")
    if trust_remote_code and engine is not Engines.vllm:
        raise typer.BadParameter("--trust-remote-code is for --engine vllm; Zili's own engine runs no code of a folder")
    if allow_host and engine is Engines.vllm:
        raise typer.BadParameter("--allow-host is for Zili's own engine; vLLM checks no names")
    if path is not None:
        model_at(path)
    names = _origins(allow_origin or ()), _hosts(allow_host or ())
    device = None
    if engine is Engines.zili:
        from zili.serving.place import open_device, prepared

        # Before anything else loads torch; not in this thread, since choosing operations multiplies.
        device = prepared(lambda: open_device(chip))
    from zili.serving.handover import Offer

    place = _demo() if path is None else path
    called = name or (place.stem if place.is_file() else place.resolve().name)
    offer = Offer(host, port, called, slots, context, dtype)
    if device is None:
        _hand_over(place, offer, keys, chip, trust_remote_code)
    else:
        _answer(place, offer, device, keys, template, {"waiting": queue, "answer_seconds": timeout}, names)


def _demo() -> Path:
    from zili.serving.model_folder import demo_file

    return demo_file()


def _answer(
    place: Path,
    offer: Offer,
    device: torch.device,
    keys: Path | None,
    template: str | None,
    limits: dict[str, Any],
    names: tuple[list[str], list[str]],
) -> None:
    from zili.serving.place import prepared

    try:
        from zili.serving.http.api import Served
        from zili.serving.http.gate import Limits
        from zili.serving.http.keys import Keys
        from zili.serving.http.server import listen
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'zili[serve]'") from error
    known = Keys.read(keys) if keys else Keys()
    from zili.serving.model_folder import OpenedModel, open_folder

    def prepare() -> tuple[OpenedModel, Engine]:
        from zili.serving.generate.engine import Engine
        from zili.serving.generate.room import room_for

        dtype = dtype_named(offer.dtype or "float32")
        opened = open_folder(place, device=device, dtype=dtype, template=template)
        room = room_for(opened.model.config, offer.slots, offer.context, dtype, device)
        typer.echo(room.said(offer.slots), err=True)  # the first line of output is the address
        vocabulary = opened.tokenizer.vocab_size
        return opened, Engine(opened.model, slots=room.slots, context=room.context, vocabulary=vocabulary)

    opened, running = prepared(prepare)
    with running:
        served = Served(running, opened.tokenizer, opened.dialect, offer.name, known, Limits(**limits), *names)
        listen(served, offer.host, offer.port, typer.echo)


def _origins(given: Sequence[str]) -> list[str]:
    """As browsers send them: a scheme, a host and perhaps a port."""
    for one in given:
        parts = urlsplit(one)
        if one != "*" and (not parts.scheme or not parts.netloc or one != f"{parts.scheme}://{parts.netloc}"):
            raise typer.BadParameter(f"{one!r} is no origin; give one as http://localhost:3000, or *")
    return list(given)


def _hosts(given: Sequence[str]) -> list[str]:
    """Names alone: whatever port is asked is this server's."""
    for one in given:
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", one, re.ASCII):
            raise typer.BadParameter(f"{one!r} is no name of a host; give one as chat.example.org")
    return list(given)


def _hand_over(place: Path, offer: Offer, keys: Path | None, chip: str, trust: bool) -> NoReturn:
    from zili import chips
    from zili.serving.handover import to_vllm

    key = None
    if keys is not None:
        from zili.serving.http.keys import Keys

        holders = Keys.read(keys).holders
        if len(holders) > 1 or holders[0].key.requests_per_minute or holders[0].key.tokens_per_day:
            raise ConfigError(f"{keys}: vLLM knows one key and no limits; put a gateway before it")
        key = holders[0].key.key
    backend = chips.choose(chip).backend
    handover = to_vllm(place, offer, chip=backend.name, key=key, trust=trust)
    if handover.untrusted:
        named = ", ".join(handover.untrusted[:5])
        typer.echo(
            f"vLLM is not told to run {named}, which is not Zili's; look at it and give --trust-remote-code", err=True
        )
    if backend.vllm_plugin is not None:
        typer.echo(f"on {backend.name} vLLM needs its plugin: {backend.vllm_plugin}")
    typer.echo(" ".join(handover.arguments))
    handover.run()
