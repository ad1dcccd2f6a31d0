"""What a save costs the steps, by the tiers that it goes to: the folder alone, with a local disk, with a store.

    python benchmarks/checkpoint_tiers.py --rounds 7

One small model on the CPU, one process. In each round every set of tiers has its turn, in another order: a few steps
with nothing to save, then a save, then as many steps beside it. `call` is what the save itself keeps the loop from
going on, which is mostly the copy; `beside` is what the following steps take longer. The store is moto's S3 on
loopback, in a process of its own that shares the machine's cores: a network store takes less of them, and longer.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from start import _prepare

RECIPE = """
name = "tiers"
folder = "{folder}/run"
[model]
vocab_size = 4096
hidden_size = {hidden}
layers = 6
heads = 8
kv_heads = 8
head_dim = {head}
ffn_hidden_size = {ffn}
max_length = 256
[data]
sources = [{{ store = "{data}/data/train" }}]
tokenizer = "{data}/data/tokenizer"
[training]
steps = 100000
sequence_length = 128
global_batch = 4
micro_batch = 4
[chip]
name = "cpu"
precision = "fp32"
compile = false
[checkpoint]
every = 0
"""
SETS = {"folder": "", "folder + disk": "d", "folder + store": "s", "folder + disk + store": "ds"}
MOTO = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="before and beside each save")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--port", type=int, default=31_555, help="of moto's server on loopback")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        server = _store(arguments.port)
        try:
            _measure(Path(scratch), arguments)
        finally:
            server.kill()
            server.wait()


def _store(port: int) -> subprocess.Popen[bytes]:
    """moto's server, and the environment that leads there."""
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="someone",
        AWS_SECRET_ACCESS_KEY="anything",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", MOTO, str(port)], **quiet)


def _bucket() -> None:
    import fsspec

    for _ in range(100):
        try:
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
            return
        except Exception:  # not up yet
            time.sleep(0.2)
    raise SystemExit("moto's server does not answer")


def _measure(folder: Path, arguments: argparse.Namespace) -> None:
    _prepare(folder)
    _bucket()
    trainers = {name: _trainer(folder, number, arguments.hidden) for number, name in enumerate(SETS)}
    rows: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for number in range(arguments.rounds + 1):
        for name in random.sample(list(SETS), len(SETS)):
            rows[name].append(_turn(trainers[name], arguments.steps))
        print(f"round {number} of {arguments.rounds}", file=sys.stderr, flush=True)
    newest = max(trainers["folder"].saver.folder.glob("step-*"))
    size = sum(file.stat().st_size for file in newest.iterdir())
    print(f"{size / 1e6:.0f} MB a checkpoint, medians of {arguments.rounds} rounds (the first is left out)")
    _table({name: turns[1:] for name, turns in rows.items()}, arguments.steps)


def _table(rows: dict[str, list[tuple[float, ...]]], steps: int) -> None:
    print("| tiers | step, s | call, s | beside, s | steps with a save over those before | all whole after, s |")
    print("|---|---|---|---|---|---|")
    for name in SETS:
        turns = rows[name]
        step, call, beside, whole = (median(column) for column in zip(*turns, strict=True))
        ratio = median(1 + (call + beside) / (steps * step) for step, call, beside, _ in turns)
        print(f"| {name} | {step:.3f} | {call:.3f} | {beside:.2f} | {ratio:.2f} | {whole:.2f} |")


def _trainer(folder: Path, number: int, hidden: int) -> Any:
    from zili.config import load_recipe
    from zili.runs.opening import open_run

    kinds = list(SETS.values())[number]
    places = [f'{{place = "{folder}/disk-{number}", every = 1}}'] if "d" in kinds else []
    places += [f'{{place = "s3://bucket/{number}", every = 1}}'] if "s" in kinds else []
    recipe = folder / "recipe.toml"
    sizes = {"hidden": hidden, "head": hidden // 8, "ffn": 4 * hidden}
    recipe.write_text(RECIPE.format(folder=folder / str(number), data=folder, **sizes), encoding="utf-8")
    config = load_recipe(recipe, [f"checkpoint.tiers=[{', '.join(places)}]"])
    return open_run(config).trainer([])


def _turn(trainer: Any, steps: int) -> tuple[float, ...]:
    """Seconds of a step, of the save, of what the steps beside it take longer, and until all tiers have it."""
    before = _steps(trainer, steps)
    begun = time.perf_counter()
    trainer.save()
    call = time.perf_counter() - begun
    beside = _steps(trainer, steps)
    trainer.saver.wait()
    return before / steps, call, beside - before, time.perf_counter() - begun


def _steps(trainer: Any, count: int) -> float:
    begun = time.perf_counter()
    for _ in range(count):
        trainer.train_step(trainer.loader.batch(trainer.step))
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
