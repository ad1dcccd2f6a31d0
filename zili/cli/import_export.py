"""`zili import`, `zili export` and `zili verify`: published models in, releases out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zili import chips
from zili.cli.options import AsJson, dtype_named, finite, model_at, program
from zili.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from zili.release.record import Evaluation, Release

Dtype = Annotated[
    str | None, typer.Option(help="Convert to float32, bfloat16 or float16; the stored dtype if not given.")
]
ShardGb = Annotated[float, typer.Option(help="Largest weight file, in GB.", min=0.001, callback=finite)]


def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="Model folder, GGUF file, hf:OWNER/NAME[@REVISION], modelscope:..., or demo.", metavar="SOURCE"
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="Zili model folder to make.")],
    dtype: Dtype = None,
    shard_gb: ShardGb = 5.0,
) -> None:
    """Read a published model into a Zili model folder, every tensor byte for byte; quantised ones as fp32."""
    _set_environment()
    # Before torch, which takes seconds. What has a colon is a hub's, or is refused as such.
    if source != "demo" and ":" not in source and not Path(source).exists():
        raise CheckpointError(
            f"{source} does not exist; give a model folder or a GGUF file, or hf:OWNER/NAME or modelscope:OWNER/NAME, "
            "which is fetched"
        )
    from zili.models.arithmetic import count_parameters
    from zili.release import import_model
    from zili.release.hub import fetch, is_hub_name
    from zili.serving.model_folder import demo_file

    place = fetch(source) if is_hub_name(source) else demo_file() if source == "demo" else Path(source)
    model = import_model(place, to, dtype=dtype_named(dtype) if dtype else None, max_shard_bytes=int(shard_gb * 1e9))
    layout = model.origin.layout if model.origin else "zili"
    typer.echo(f"{source} is in the {layout} layout, {count_parameters(model.config).total:,} parameters")
    if (to / "tokenizer.json").is_file():
        typer.echo(f"Wrote {to}. Next: {program()} chat {to}")
    else:
        typer.echo(f"Wrote {to}. It has no tokenizer.json, so it can be loaded (zili.load) but not talked to yet.")


def export(
    source: Annotated[Path, typer.Argument(help="Run, checkpoint or model folder.", metavar="PATH")],
    to: Annotated[Path, typer.Option("--to", help="Hugging Face folder to make.")],
    layout: Annotated[
        str, typer.Option("--as", help="telechat2, telechat3, llama, gguf; or auto: as it came, or what holds it.")
    ] = "auto",
    dtype: Dtype = None,
    shard_gb: ShardGb = 5.0,
    scores: Annotated[
        list[Path] | None, typer.Option(help="Results of `zili eval --out` for the model card; may be repeated.")
    ] = None,
    license_name: Annotated[str, typer.Option("--license", help="For the model card.")] = "other",
) -> None:
    """Write a model as a release folder that transformers, vLLM or llama.cpp run, and compare it with its source."""
    model_at(source)
    _set_environment()
    from zili.release import export_model

    release = export_model(
        source,
        to,
        layout=layout,
        dtype=dtype_named(dtype) if dtype else None,
        max_shard_bytes=int(shard_gb * 1e9),
        evaluations=_evaluations(source, scores or []),
        license_name=license_name,
    )
    reason = " (--as auto: the layout it came in, or the first that holds it)" if layout == "auto" else ""
    typer.echo(f"Wrote {to} in the {release.layout} layout{reason}, weights in {release.dtype}")
    for note in release.notes:
        typer.echo(f"  {note}")
    typer.echo(f"Read back: log-probabilities within {release.difference:.2g} nats of {source}{_rounding(release)}")


def verify(
    folder: Annotated[Path, typer.Argument(help="Release folder, as `zili export` makes them.")],
    against: Annotated[
        Path | None, typer.Option(help="Run or checkpoint that it was made from, to be computed again.")
    ] = None,
    transformers: Annotated[
        bool | None,
        typer.Option(
            "--transformers/--no-transformers",
            help="Compare with transformers' own classes too; by default where it is installed and there is room.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hash a release's files again, load it, and compare what its model says with what was recorded.

    Exit codes: 0 all holds, 4 its tokenizer cannot be read, 5 anything else that does not hold.
    """
    for place in filter(None, (folder, against)):
        model_at(place)
    _set_environment()
    from zili.release.verifying import verify_release

    found = verify_release(folder, against=against, transformers=transformers)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=1))
        return
    for finding in found:
        typer.echo(f"{finding.what}: {finding.detail}")
    typer.echo(f"{folder} holds")


def _rounding(release: Release) -> str:
    """How much of the difference is that of the dtype, where most is."""
    rest = release.but_for_rounding
    if rest is None or rest >= release.difference:
        return ""
    return f" as it is stored, within {rest:.2g} of it in {release.dtype}"


def _set_environment() -> None:
    """The CPU's, where all of this is computed, before torch is imported."""
    chips.apply_environment(chips.find_backend("cpu"))


def _evaluations(source: Path, scores: list[Path]) -> list[Evaluation]:
    """What there is for the card's table: held-out bits per byte of a run, and the files given."""
    from zili.release.record import Evaluation

    found = _held_out(source)
    for path in scores:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found += [Evaluation(**row) for row in record["evaluations"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} holds no results of `zili eval --out` ({error})") from error
    return found


def _held_out(source: Path) -> list[Evaluation]:
    from zili.evaluation.run_record import number, read_run
    from zili.release.record import Evaluation

    run = source.parent.parent if source.parent.name == "checkpoints" else source
    try:
        evals = read_run(run).evals
    except DataError:
        return []
    last = next((record for record in reversed(evals) if number(record, "bits_per_byte") is not None), None)
    if last is None:
        return []
    size = number(last, "bytes")
    task = f"held-out text, {size:,.0f} bytes" if size else "held-out text"
    return [Evaluation(task, f"bits per byte at step {last['step']:,}", float(last["bits_per_byte"]))]
