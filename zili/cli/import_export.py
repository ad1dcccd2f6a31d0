"""`zili import`, `zili export` and `zili verify`: published models in, releases out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zili import api, chips
from zili.cli.options import AsJson, finite, model_at, program
from zili.errors import CheckpointError

if TYPE_CHECKING:
    from zili.release.record import Release

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
    from zili.release.tensors import dtype_named
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
        str,
        typer.Option(
            "--as",
            help="telechat2, telechat3, llama or gguf; auto: the layout that it came in, else one that can hold it.",
        ),
    ] = "auto",
    dtype: Dtype = None,
    shard_gb: ShardGb = 5.0,
    scores: Annotated[
        list[Path] | None, typer.Option(help="Results of `zili eval --out` for the model card; may be repeated.")
    ] = None,
    license_name: Annotated[str, typer.Option("--license", help="Licence, for the model card.")] = "other",
) -> None:
    """Write a model as a release folder that transformers, vLLM or llama.cpp run, and compare it with its source."""
    model_at(source)
    release = api.export(
        source, to, layout=layout, dtype=dtype, shard_gb=shard_gb, scores=scores or (), license_name=license_name
    )
    reason = " (--as auto: the layout it came in, or the first that holds it)" if layout == "auto" else ""
    typer.echo(f"Wrote {to} in the {release.layout} layout{reason}, weights in {release.dtype}")
    for note in release.notes:
        typer.echo(f"  {note}")
    typer.echo(f"Read back: log-probabilities within {release.difference:.2g} nats of {source}{_rounding(release)}")


def verify(
    folder: Annotated[Path, typer.Argument(help="Release folder, as `zili export` makes them.")],
    against: Annotated[
        Path | None, typer.Option(help="Run or checkpoint that the release was made from: it is asked again.")
    ] = None,
    transformers: Annotated[
        bool | None,
        typer.Option(
            "--transformers/--no-transformers",
            help="Compare with transformers' classes too; by default if it is installed and memory suffices.",
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
