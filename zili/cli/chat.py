"""`zili chat`: talk with a model in the terminal."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from zili.cli.options import Chip, Demo, ModelPath, RepetitionPenalty, Temperature, Template, TopK, TopP, model_at


class Mode(StrEnum):
    """How the model is addressed."""

    auto = "auto"
    chat = "chat"
    text = "text"


def chat(
    path: ModelPath = None,
    *,
    demo: Demo = False,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    template: Template = None,
    thinking: Annotated[
        bool, typer.Option(help="Let the model think first, if its template offers the choice.")
    ] = True,
    mode: Annotated[
        Mode, typer.Option(help="chat: talk in turns; text: continue the text; auto: what the model was made for.")
    ] = Mode.auto,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    chip: Chip = "auto",
    seed: Annotated[int, typer.Option(help="The same seed and lines give the same answers.")] = 0,
) -> None:
    """Talk with a model, or let a base model continue your text. Lines may also be piped in."""
    if path is None and not demo:
        raise typer.BadParameter("give a model, or --demo")
    if path is not None:
        model_at(path)
    from zili.serving.place import open_device

    device = open_device(chip)
    from zili.serving.generate.conversation import Conversation, LiveDialogue, RunningText
    from zili.serving.generate.generation import Sampling
    from zili.serving.generate.terminal import Chat, piped_lines, typed_lines, write_note, write_output
    from zili.serving.model_folder import demo_file, open_folder

    opened = open_folder(demo_file() if path is None else path, device=device, template=template)
    talks = mode is Mode.chat or (mode is Mode.auto and opened.conversational)
    conversation: Conversation = RunningText(opened.tokenizer)
    if talks and opened.dialect is not None:
        conversation = LiveDialogue(opened.dialect, system, {"enable_thinking": thinking})
    elif mode is Mode.chat:
        write_note("The model has no chat template and its tokenizer no marks of one: the text is continued as it is.")
    terminal = Chat(
        opened.model,
        conversation,
        write=write_output,
        note=write_note,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p, top_k, repetition_penalty, seed).checked(),
    )
    terminal.run(typed_lines("> ", write_note) if sys.stdin.isatty() else piped_lines())
