"""`zili eval`: bits per byte of a model on any text, beside reference compressors; and how it answers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zili import api
from zili.cli.options import (
    AsJson,
    Chip,
    OnError,
    OnErrorOption,
    Template,
    TextField,
    model_at,
    present,
    refuse_unwritable,
)
from zili.cli.output import working
from zili.errors import DataError
from zili.plurals import counted

if TYPE_CHECKING:
    from zili.evaluation.answers import AnswerScore
    from zili.evaluation.bits_per_byte import Score
    from zili.release.record import Evaluation


Text = Annotated[list[Path] | None, typer.Option(help="File or folder of text; may be repeated.")]
Answers = Annotated[
    list[Path] | None,
    typer.Option(
        help="File or folder of conversations: how often the model gives the last answer word for word. May be "
        "repeated."
    ),
]
Tasks = Annotated[
    str | None, typer.Option(help="Tasks and groups of lm-eval, or Zili's own (zili_arithmetic, ...), with commas.")
]
IncludePath = Annotated[Path | None, typer.Option(help="Folder with task files of your own.")]
ListTasks = Annotated[bool, typer.Option("--list-tasks", help="List all tasks.")]
FewShot = Annotated[int | None, typer.Option(help="Examples in the context; by default the task's own number.", min=0)]
Limit = Annotated[int | None, typer.Option(help="Questions of each task; all if not given.", min=1)]
AsChat = Annotated[bool, typer.Option("--chat", help="Ask in turns of the model's chat template.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Out = Annotated[Path | None, typer.Option(help="Write the results of --answers or --tasks here, for a model card.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in a window; by default the training length.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Windows in a batch.", min=1)]
MaxBytes = Annotated[int | None, typer.Option(help="Stop after so many bytes of text.", min=1)]


def eval_(
    path: Annotated[Path | None, typer.Argument(help="Run, checkpoint or model folder.", metavar="PATH")] = None,
    *,
    text: Text = None,
    answers: Answers = None,
    tasks: Tasks = None,
    include_path: IncludePath = None,
    list_tasks: ListTasks = False,
    few_shot: FewShot = None,
    limit: Limit = None,
    as_chat: AsChat = False,
    template: Template = None,
    max_new_tokens: MaxNewTokens = 256,
    out: Out = None,
    text_field: TextField = "text",
    on_error: OnErrorOption = OnError.RAISE,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 8,
    max_bytes: MaxBytes = None,
    chip: Chip = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure bits per byte on text the model has not seen, lower is better; or how conversations are answered."""
    if list_tasks:
        from zili.evaluation.harness import task_names

        typer.echo("\n".join(task_names(include_path)))
        return
    if path is None or sum(map(bool, (text, answers, tasks))) != 1:
        raise typer.BadParameter("give a model, and --text, --answers or --tasks")
    refuse_unwritable(out)
    model_at(path)
    present([*(text or []), *(answers or [])])
    if text:
        with working("scoring") as status:
            score = api.evaluate(
                path,
                text,
                sequence_length=sequence_length,
                batch_size=batch_size,
                max_bytes=max_bytes,
                text_field=text_field,
                on_error=on_error.value,
                compressors=True,
                chip=chip,
                progress=status,
            )
        typer.echo(json.dumps(score.as_json()) if as_json else _table(path, score))
        return
    from zili.serving.place import open_device

    device = open_device(chip)
    if answers:
        _answers(path, answers, template, max_new_tokens, device, as_json, out)
    elif tasks:
        asked = _Asked(tasks.split(","), include_path, few_shot, limit, as_chat, template, batch_size)
        _tasks(path, asked, device, as_json, out)


def _answers(
    path: Path, places: list[Path], template: str | None, longest: int, device: Any, as_json: bool, out: Path | None
) -> None:
    from zili.data.dialogues import read_dialogues
    from zili.durable import write_whole
    from zili.evaluation.answers import score_answers
    from zili.serving.model_folder import open_folder

    opened = open_folder(path, device=device, template=template)
    if opened.dialect is None:
        raise DataError(f"{path} has no chat template, nor special tokens of one that is known; give --template")
    files = [file for place in places for file in (sorted(place.glob("*.json*")) if place.is_dir() else [place])]
    scores = []
    with working("answering") as status:
        for file in files:
            say = f"answering {file.name}: "
            scores.append(
                score_answers(
                    opened.model,
                    opened.dialect,
                    read_dialogues([file]),
                    file.stem,
                    max_new_tokens=longest,
                    progress=lambda count, say=say: status(f"{say}{count}"),  # type: ignore[misc]
                )
            )
    command = f"zili eval {path.name} --answers {' '.join(place.name for place in places)}"
    record = {
        "model": path.name,
        "scores": [score.as_json() for score in scores],
        "evaluations": [
            {
                "task": score.name,
                "metric": "exact answers",
                "value": score.share,
                "error": score.error,
                "samples": score.answered,
                "few_shot": 0,
                "command": command,
            }
            for score in scores
        ],
    }
    if out is not None:
        write_whole(out, json.dumps(record, indent=1) + "\n")
    typer.echo(json.dumps(record) if as_json else _answer_table(scores))


@dataclass(frozen=True)
class _Asked:
    """Tasks, and how."""

    names: list[str]
    include: Path | None
    few_shot: int | None
    limit: int | None
    chat: bool
    template: str | None
    batch_size: int


def _tasks(path: Path, asked: _Asked, device: Any, as_json: bool, out: Path | None) -> None:
    from zili.durable import write_whole
    from zili.evaluation.harness import Scorer, run_tasks
    from zili.serving.model_folder import open_folder

    scorer = Scorer(open_folder(path, device=device, template=asked.template), asked.batch_size)
    with working("loading tasks") as status:
        scores = run_tasks(
            scorer,
            asked.names,
            include=asked.include,
            few_shot=asked.few_shot,
            limit=asked.limit,
            chat=asked.chat,
            progress=status,
        )
    command = f"zili eval {path.name} --tasks {','.join(asked.names)}" + (" --chat" if asked.chat else "")
    command += f" --limit {asked.limit}" if asked.limit else ""
    record = {"model": path.name, "evaluations": [asdict(replace(score, command=command)) for score in scores]}
    if out is not None:
        write_whole(out, json.dumps(record, indent=1) + "\n")
    typer.echo(json.dumps(record) if as_json else _task_table(scores))
    if scorer.shortened:
        contexts = counted(scorer.shortened, "context")
        longer = f"the beginnings of {contexts} were left out, longer than the model's"
        typer.echo(longer, err=as_json)


def _task_table(scores: list[Evaluation]) -> str:
    width = max(12, *(len(score.task) for score in scores))
    metrics = max(12, *(len(score.metric) for score in scores))
    rows = [f"{'task':<{width}}  {'metric':<{metrics}}     value   error      n  few-shot"]
    for score in scores:
        error = "      -" if score.error is None else f"{score.error:7.4f}"
        star = " *" if score.generated else ""
        rows.append(
            f"{score.task:<{width}}  {score.metric:<{metrics}}  {score.value:8.4f} {error} {score.samples:6,} "
            f"{score.few_shot:9}{star}"
        )
    if any(score.generated for score in scores):
        rows.append("* generated by Zili: no benchmark")
    return "\n".join(rows)


def _answer_table(scores: list[AnswerScore]) -> str:
    width = max(12, *(len(score.name) for score in scores))
    rows = [
        f"{score.name:<{width}}  {score.answered:>8,}  {100 * score.share:6.1f} ± {100 * score.error:4.1f} %  "
        f"{score.loss:10.4f}" + (f"  {score.left_out} left out, longer than the context" if score.left_out else "")
        for score in scores
    ]
    return "\n".join([f"{'':<{width}}  answered  {'exactly':>15}  nats/token", *rows])


def _table(path: Path, score: Score) -> str:
    rows = [(str(path), score.bits_per_byte), *((r.name, r.bits_per_byte) for r in score.compressors)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        [
            f"{counted(score.documents, 'document')}, {counted(score.bytes, 'byte')}, "
            f"{counted(score.tokens, 'token')} in {score.seconds:.1f} s; loss {score.loss_per_token:.4f} nats a token",
            f"{'bits per byte':>{width + 15}}",
            *(f"{name:<{width}}  {value:13.4f}" for name, value in rows),
        ]
    )
