"""`zili serve`: OpenAI's API on a model of yours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn
from urllib.parse import urlsplit

import typer

from zili import api, chips
from zili.cli.options import Chip, Demo, ModelPath, Template, finite, model_at
from zili.errors import ConfigError

if TYPE_CHECKING:
    from zili.serving.handover import Offer


class Engines(StrEnum):
    """The engine that answers."""

    zili = "zili"
    vllm = "vllm"


AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(
        help="Web page whose scripts may ask, such as https://chat.example.org; * allows all. May be repeated."
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        help="Host name that clients without a key may use on this machine, such as chat.example.org. May be repeated."
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16, float16 or float32 (ours by default) for weights and products.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="With vllm: run Python code of the folder that is not Zili's.")
]


def serve(
    path: ModelPath = None,
    *,
    demo: Demo = False,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: all addresses of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What the model is called; its folder's name by default.")] = None,
    template: Template = None,
    keys: Annotated[
        Path | None, typer.Option(help="TOML file of keys and their limits; every client then needs a key.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Answers at once, if memory suffices; others wait.", min=1)] = 16,
    context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer; the model's by default.")] = None,
    dtype: Dtype = None,
    queue: Annotated[int, typer.Option(help="Answers that may wait; others are refused.", min=1)] = 256,
    timeout: Annotated[
        float, typer.Option(help="Seconds that an answer may take, with its waiting.", min=1, callback=finite)
    ] = 600,
    allow_origin: AllowOrigin = None,
    allow_host: AllowHost = None,
    engine: Annotated[
        Engines, typer.Option(help="vllm: hand a released folder to vLLM, with the right arguments.")
    ] = Engines.zili,
    trust_remote_code: TrustRemoteCode = False,
    chip: Chip = "auto",
) -> None:
    """Answer over HTTP as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models, /tokenize."""
    if path is None and not demo:
        raise typer.BadParameter("give a model, or --demo")
    _check_engine(engine, trust_remote_code, allow_host or ())
    if path is not None:
        model_at(path)
    origins, hosts = _origins(allow_origin or ()), _hosts(allow_host or ())
    place = _demo(chip) if path is None else path
    if engine is Engines.vllm:
        from zili.serving.handover import Offer, called

        offer = Offer(host, port, called(place, name), slots, context, dtype)
        _hand_over(place, offer, keys, chip, trust_remote_code)
    api.serve(
        place,
        host=host,
        port=port,
        name=name,
        template=template,
        keys=keys,
        slots=slots,
        context=context,
        dtype=dtype or "float32",
        queue=queue,
        timeout=timeout,
        allow_origin=origins,
        allow_host=hosts,
        chip=chip,
    )


def _check_engine(engine: Engines, trust_remote_code: bool, allow_host: Sequence[str]) -> None:
    """Refuse options that the engine does not have."""
    if trust_remote_code and engine is not Engines.vllm:
        raise typer.BadParameter("--trust-remote-code is for --engine vllm; Zili's own engine runs no code of a folder")
    if allow_host and engine is Engines.vllm:
        raise typer.BadParameter("--allow-host is for Zili's own engine; vLLM checks no names")


def _demo(chip: str) -> Path:
    chips.apply_environment(chips.choose(chip).backend)  # what comes next imports torch
    from zili.serving.model_folder import demo_file

    return demo_file()


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
