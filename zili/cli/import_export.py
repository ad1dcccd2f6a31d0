"""`zili import` and `zili export`: models between Hugging Face's form and Zili's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zili.cli.options import program
from zili.errors import ConfigError

if TYPE_CHECKING:
    import torch

Dtype = Annotated[
    str | None, typer.Option(help="Convert to float32, bfloat16 or float16; the stored dtype if not given.")
]
ShardGb = Annotated[float, typer.Option(help="Largest weight file, in GB.", min=0.001)]


def import_(
    source: Annotated[Path, typer.Argument(help="Hugging Face model folder.", metavar="HF_FOLDER")],
    to: Annotated[Path, typer.Option("--to", help="Zili model folder to make.")],
    dtype: Dtype = None,
    shard_gb: ShardGb = 5.0,
) -> None:
    """Read a published model into a Zili model folder, every tensor byte for byte."""
    from zili.models.arithmetic import count_parameters
    from zili.release import import_model

    model = import_model(source, to, dtype=_dtype(dtype), max_shard_bytes=int(shard_gb * 1e9))
    layout = model.origin.layout if model.origin else "zili"
    typer.echo(f"{source} is in the {layout} layout, {count_parameters(model.config).total:,} parameters")
    if (to / "tokenizer.json").is_file():
        typer.echo(f"Wrote {to}. Next: {program()} chat {to}")
    else:
        typer.echo(f"Wrote {to}. It has no tokenizer.json, so it can be loaded (zili.load) but not talked to yet.")


def export(
    source: Annotated[Path, typer.Argument(help="Run, checkpoint or model folder.", metavar="PATH")],
    to: Annotated[Path, typer.Option("--to", help="Hugging Face folder to make.")],
    layout: Annotated[str, typer.Option("--as", help="telechat2, telechat52, llama or auto.")] = "auto",
    dtype: Dtype = None,
    shard_gb: ShardGb = 5.0,
) -> None:
    """Write a model as a Hugging Face folder of safetensors."""
    from zili.release import export_model

    chosen = export_model(source, to, layout=layout, dtype=_dtype(dtype), max_shard_bytes=int(shard_gb * 1e9))
    reason = " (--as auto: the layout it came in, or the first that holds it)" if layout == "auto" else ""
    typer.echo(f"Wrote {to} in the {chosen} layout{reason}")


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in names:
        raise ConfigError(f"--dtype {name!r} is not one of {', '.join(names)}")
    return names[name] if name else None
