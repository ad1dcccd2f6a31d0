"""Seconds from `zili train` to its first line and to its first step, for the recipe of docs/training.md.

    python benchmarks/start.py --rounds 5

Its text is Python's own `asyncio`, `email` and `json`. The first start of a round has an empty ZILI_CACHE, the second
finds what the first has measured. Printed are medians; `CPU` is what the process and its threads computed by then,
which other programs on the machine lengthen less.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

RECIPE = """
name = "mine"
folder = "{folder}/run"
[model]
vocab_size = 4096
hidden_size = 128
layers = 4
heads = 4
kv_heads = 2
head_dim = 32
ffn_hidden_size = 384
max_length = 1024
[data]
sources = [{{ store = "{folder}/data/train" }}]
tokenizer = "{folder}/data/tokenizer"
[training]
steps = {steps}
sequence_length = 256
global_batch = 8
"""
STEPS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("words", nargs="*", help="further arguments of zili train, after --")
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, ...]]] = {"empty cache": [], "measured before": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = prepared(folder)
        for number in range(arguments.rounds):
            for rows in found.values():
                rows.append(_start(recipe, number, arguments.words))
    for name, rows in found.items():
        line, step, cpu = (median(column) for column in zip(*rows, strict=True))
        print(f"{name:<16} first line {line:.1f} s, step 1 {step:.1f} s, CPU {cpu:.1f} s")


def prepared(folder: Path) -> Path:
    """A recipe in a folder, with its text and tokenizer."""
    from zili.data import prepare

    library = Path(os.__file__).parent
    packages = [str(library / name) for name in ("asyncio", "email", "json")]
    prepare(packages, folder / "data", vocab_size=4096, held_out_fraction=0.1)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder, steps=STEPS), encoding="utf-8")
    return recipe


def _start(recipe: Path, number: int, words: list[str]) -> tuple[float, float, float]:
    """Seconds to the first line and to step 1, and seconds of CPU until it was stopped there."""
    run = recipe.with_name(f"run-{time.time_ns()}")
    command = [sys.executable, "-m", "zili", "train", str(recipe), "--set", f"folder={run}", *words]
    environment = os.environ | {"ZILI_CACHE": str(recipe.with_name(f"cache-{number}")), "PYTHONUNBUFFERED": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = None
    for line in process.stdout:
        first = first or time.perf_counter() - started
        if line.startswith("step 1/"):
            break
    step = time.perf_counter() - started
    process.kill()
    process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert first is not None
    return first, step, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
