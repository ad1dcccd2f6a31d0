"""What it costs a run to watch itself: a plain step beside one that is judged, and the looks now and then.

    torchrun --nproc-per-node 3 benchmarks/watching.py [--rounds 20]

A model of 3.5 million parameters on the CPU, replicas, rows of 128 tokens, two micro-batches of four a process. Every
kind of step is made once a round, so that a machine whose speed drifts slows all of them; medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

WARM = 2
"""Rounds that do not count."""


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--rounds", type=int, default=20)
    asked = given.parse_args()
    from zili.parallel.layout import processes

    rank, size, _ = processes()
    folder = Path(tempfile.gettempdir()) / "zili-watching"
    if rank == 0:
        _prepare(folder)
    while not (folder / "there").exists():
        time.sleep(0.2)
    kinds = _kinds(folder, size)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(asked.rounds + WARM):
        for name, work in kinds.items():
            begun = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begun)
    if rank == 0:
        plain = statistics.median(seconds["a step"][WARM:])
        print("| what | ms | of a step |\n|---|---|---|")
        for name, found in seconds.items():
            middle = statistics.median(found[WARM:])
            print(f"| {name} | {1000 * middle:.1f} | {middle / plain:.2f} |")
        (folder / "there").unlink()


def _prepare(folder: Path) -> None:
    from zili.data import Document, Tokenizer, build_store

    folder.mkdir(exist_ok=True)
    (folder / "there").unlink(missing_ok=True)
    texts = [" ".join(f"word{(7 * i + j * j) % 997}" for j in range(200)) for i in range(200)]
    tokenizer = Tokenizer.train(texts, vocab_size=512)
    tokenizer.save(folder / "tokenizer")
    build_store(
        [Document(text, str(i)) for i, text in enumerate(texts)], tokenizer, folder / "train", engine="tokenizers"
    )
    (folder / "there").touch()


def _kinds(folder: Path, size: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    from zili.config import build_config
    from zili.config.watch import WatchConfig
    from zili.runs.opening import open_run
    from zili.training.callbacks.corruption import CorruptionWatch
    from zili.training.callbacks.stragglers import StragglerWatch
    from zili.training.rolling_back import act
    from zili.training.spikes import StepWatch

    table = {
        "folder": str(folder / "run"),
        "model": {"vocab_size": 512, "hidden_size": 192, "layers": 8, "heads": 6, "kv_heads": 2, "head_dim": 32}
        | {"ffn_hidden_size": 512, "max_length": 128},
        "data": {"sources": [{"store": str(folder / "train")}], "tokenizer": str(folder / "tokenizer")},
        "training": {"steps": 10**6, "sequence_length": 128, "global_batch": 8 * size, "micro_batch": 4},
        "parallel": {"replicas": size},
        "chip": {"name": "cpu", "precision": "fp32", "compile": False},
    }
    trainer = open_run(build_config(table, (), origin="here")).trainer([])
    trainer.parallel.train()
    batch = trainer.loader.batch(0, trainer.world.rows(8 * size))
    unwatched, judging = trainer.watch, StepWatch(WatchConfig(spike="skip", threshold=1e6), trainer.device)
    stragglers, corruption = StragglerWatch(1), CorruptionWatch(1)
    for callback in (stragglers, corruption):
        callback.on_start(trainer)

    def plain() -> None:
        trainer.watch = unwatched
        float(trainer.train_step(batch)[0])

    def judged() -> None:
        trainer.watch = judging
        act(trainer)
        float(trainer.train_step(batch)[0])

    def looked_at() -> None:
        stragglers.before_step(trainer, batch)
        plain()
        stragglers.after_step(trainer)

    return {
        "a step": plain,
        "a step that is judged": judged,
        "a step in a look for stragglers": looked_at,
        "a look for wrong sums (beside its step)": lambda: corruption.before_step(trainer, batch),
        "comparing weights (before a checkpoint)": lambda: corruption._look(trainer, own_fault=False),
    }


if __name__ == "__main__":
    main()
