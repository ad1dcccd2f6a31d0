"""`zili sample`: what a model writes after a prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from zili.cli.options import Chip, RepetitionPenalty, Temperature, TopK, TopP, model_at


def sample(
    path: Annotated[Path, typer.Argument(help="Run, checkpoint or model folder.", metavar="PATH")],
    *,
    prompt: Annotated[str, typer.Option(help="Text to continue; empty begins a document.")] = "",
    number: Annotated[int, typer.Option(help="Number of samples; each has the next seed.", min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.", min=1)] = 200,
    temperature: Temperature = 0.8,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    chip: Chip = "auto",
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document a sample, a line each, and nothing else.")
    ] = False,
) -> None:
    """Continue a prompt."""
    model_at(path)
    from zili.serving.place import open_device

    device = open_device(chip)
    from zili.serving.generate.continuation import continue_text, sample_text
    from zili.serving.generate.generation import Sampling
    from zili.serving.generate.terminal import typed_text, write_output
    from zili.serving.model_folder import open_folder

    prompt = typed_text(prompt)
    opened = open_folder(path, device=device)
    for index in range(number):
        how = Sampling(temperature, top_p, top_k, repetition_penalty, seed + index)
        given = (opened.model, opened.tokenizer, prompt)
        if as_json:
            drawn = sample_text(*given, max_new_tokens=max_new_tokens, sampling=how)
            typer.echo(json.dumps(drawn.as_json(), ensure_ascii=False))
            continue
        if number > 1:
            print(f"--- sample {index + 1} of {number}, seed {how.seed}", file=sys.stderr, flush=True)
        write_output(prompt)
        for piece in continue_text(*given, max_new_tokens=max_new_tokens, sampling=how):
            write_output(piece)
        write_output("\n")
