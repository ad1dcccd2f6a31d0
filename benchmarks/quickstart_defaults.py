"""Held-out bits per byte after equal training time: how the defaults of `zili quickstart` were chosen.

    zili quickstart --minutes 1            # once: leaves the text and its tokenizer in runs/quickstart/data
    python benchmarks/quickstart_defaults.py --seconds 190 256x4-512x8:muon:3e-3 256x4-512x8:adamw:3e-3

A candidate is HIDDENxLAYERS-SEQUENCExBATCH:OPTIMIZER:PEAK_RATE. Each is timed over a few steps, trained from scratch
for as many steps as fit into the seconds given, and scored on the same held-out documents. Equal time is counted in
steps at the rate timed first, so that a disturbance later on costs no candidate its steps.
"""

from __future__ import annotations

import argparse
import re
import time
import tomllib
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from zili.config import RunConfig, build_config
from zili.runs.opening import OpenedRun, open_run

WARM_UP, TIMED = 2, 5
FORM = re.compile(r"(\d+)x(\d+)-(\d+)x(\d+):(adamw|muon):([\d.e-]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("candidates", nargs="+", metavar="256x4-512x8:muon:3e-3")
    parser.add_argument("--seconds", type=float, default=190.0)
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    arguments = parser.parse_args()
    print("| model, sequence x batch | optimizer, peak rate | parameters | steps | tokens | bits per byte |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for candidate in arguments.candidates:
        print(_row(candidate, arguments.data, arguments.seconds), flush=True)


def _recipe(candidate: str, data: Path, steps: int) -> RunConfig:
    found = FORM.fullmatch(candidate)
    if not found:
        raise SystemExit(f"{candidate!r} is not of the form 256x4-512x8:muon:3e-3")
    hidden, layers, length, batch = map(int, found.groups()[:4])
    table: dict[str, Any] = tomllib.loads((resources.files("zili.config") / "quickstart.toml").read_text())
    heads = hidden // table["model"]["head_dim"]
    table["model"] |= {
        "hidden_size": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": 2 if heads % 2 == 0 else 1,
        "ffn_hidden_size": 3 * hidden,
    }
    table["training"] |= {"steps": steps, "sequence_length": length, "global_batch": batch}
    table["optimizer"] |= {"name": found[5], "learning_rate": float(found[6])}
    table["data"] = {
        "sources": [{"store": str(data / "train")}],
        "tokenizer": str(data / "tokenizer"),
        "held_out": str(data / "held_out"),
    }
    return build_config(table, origin=candidate)


def _row(candidate: str, data: Path, seconds: float) -> str:
    opened = open_run(_recipe(candidate, data, 1000))  # activates the CPU before torch is imported

    from zili.data.store import TokenStore
    from zili.evaluation.bits_per_byte import score_token_ids, stored_documents
    from zili.models.arithmetic import count_parameters
    from zili.training.trainer import Trainer

    steps = int(seconds / _step_seconds(opened))
    opened = open_run(_recipe(candidate, data, steps))
    trainer = Trainer(opened.setup.config, opened.loader, opened.setup.device)
    trainer.model.train()
    for step in range(steps):
        trainer.train_step(opened.loader.batch(step))
    with trainer.uncompiled():
        score = score_token_ids(
            trainer.model,
            stored_documents(TokenStore.open(data / "held_out"), opened.tokenizer),
            start_token=opened.tokenizer.end_id,
            sequence_length=opened.recipe.training.sequence_length,
            batch_size=16,
        )
    shape, optimizer, rate = candidate.split(":")
    size = count_parameters(opened.recipe.model).total / 1e6
    return (
        f"| {shape} | {optimizer}, {rate} | {size:.1f} M | {steps} | {trainer.tokens:,} | {score.bits_per_byte:.3f} |"
    )


def _step_seconds(opened: OpenedRun) -> float:
    """Median of a few steps, compiled and warm, of a model that is thrown away."""
    from zili.training.trainer import Trainer

    trainer, taken = Trainer(opened.setup.config, opened.loader, opened.setup.device), []
    trainer.model.train()
    for step in range(WARM_UP + TIMED):
        started = time.perf_counter()
        trainer.train_step(opened.loader.batch(step))
        taken.append(time.perf_counter() - started)
    return median(taken[WARM_UP:])


if __name__ == "__main__":
    main()
