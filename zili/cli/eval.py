"""`zili eval`: bits per byte of a model on any text, beside reference compressors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zili.cli.options import OnError, OnErrorOption, TextField

if TYPE_CHECKING:
    from zili.evaluation.bits_per_byte import Score
    from zili.evaluation.compressors import Reference


def eval_(
    path: Annotated[Path, typer.Argument(help="Run, checkpoint or model folder.", metavar="PATH")],
    *,
    text: Annotated[list[Path], typer.Option(help="File or folder of text; may be repeated.")],
    text_field: TextField = "text",
    on_error: OnErrorOption = OnError.RAISE,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in a window; the training length if not given.", min=2)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.", min=1)] = 8,
    max_bytes: Annotated[int | None, typer.Option(help="Stop after so many bytes of text.", min=1)] = None,
    chip: Annotated[str, typer.Option(help="Where to run; `zili chips` lists names.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure bits per byte on text the model has not seen; lower is better."""
    from zili.serving.place import open_device

    device = open_device(chip)
    from rich.console import Console

    from zili.data.reading import read_documents
    from zili.evaluation.bits_per_byte import bits_per_byte, limit_bytes
    from zili.evaluation.compressors import reference_compressors
    from zili.serving.model_folder import open_folder

    documents = read_documents(text, text_field=text_field, on_error=on_error.value)
    # Held in memory, because xz and zstd are given all of it at once anyway.
    texts = list(limit_bytes((document.text for document in documents), max_bytes))
    opened = open_folder(path, device=device)
    with Console(stderr=True).status("scoring") as status:
        score = bits_per_byte(
            opened.model,
            opened.tokenizer,
            texts,
            sequence_length=sequence_length or opened.training_length,
            batch_size=batch_size,
            progress=lambda tokens: status.update(f"scoring: {tokens:,} tokens"),
        )
        status.update("compressing for comparison")
        references = reference_compressors(texts)
    typer.echo(json.dumps(_record(score, references)) if as_json else _table(path, score, references))


def _record(score: Score, references: list[Reference]) -> dict[str, Any]:
    return {**score.as_json(), "compressors": [reference.as_json() for reference in references]}


def _table(path: Path, score: Score, references: list[Reference]) -> str:
    rows = [(str(path), score.bits_per_byte), *((r.name, r.bits_per_byte) for r in references)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        [
            f"{score.documents:,} document{'s' * (score.documents != 1)}, {score.bytes:,} bytes, "
            f"{score.tokens:,} tokens in {score.seconds:.1f} s; loss {score.loss_per_token:.4f} nats a token",
            f"{'bits per byte':>{width + 15}}",
            *(f"{name:<{width}}  {value:13.4f}" for name, value in rows),
        ]
    )
