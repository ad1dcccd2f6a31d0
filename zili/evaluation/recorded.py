"""Reads the results of `zili eval` for a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from zili.errors import DataError
from zili.evaluation.run_record import number, read_run
from zili.release.record import Evaluation


def evaluations_of(source: Path, scores: Sequence[Path]) -> list[Evaluation]:
    """What there is for a model card's table: held-out bits per byte of a run, and the files given.

    Raises:
        DataError: a file holds no results.
    """
    found = _held_out(source)
    for path in scores:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found += [Evaluation(**row) for row in record["evaluations"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} holds no results of `zili eval --out` ({error})") from error
    return found


def _held_out(source: Path) -> list[Evaluation]:
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
