"""How long OpenMP's threads should wait busily (GOMP_SPINCOUNT) before they sleep: alone, and beside other work.

    python benchmarks/spin.py --rounds 7

Each setting has a process of its own, since libgomp reads it once, when it is loaded. The processes take turns at two
kinds of work and sleep otherwise: `train`, three steps of the quickstart's model, compiled; `serve`, 16 tokens for each
of four conversations with the same model. Beside them 0, 1, 2 and 4 processes count busily. Printed is the speed, the
median of the rounds, as a share of what the same round's default (no variable) reached with nothing beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import resources
from statistics import median

SETTINGS: dict[str, dict[str, str]] = {
    "no variable": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in (0, 2000, 10_000, 50_000)},
}
BESIDE = (0, 1, 2, 4)
WORK = ("train", "serve")
STEPS, CONVERSATIONS, ANSWER = 3, 4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _serve_parent()
        return
    children = {name: _started(variables) for name, variables in SETTINGS.items()}
    seconds: dict[tuple[str, str, int], list[float]] = {}
    try:
        for _ in range(arguments.rounds):
            for count in BESIDE:
                busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
                try:
                    for work in WORK:
                        for name, child in children.items():
                            seconds.setdefault((work, name, count), []).append(_ask(child, work))
                finally:
                    for process in busy:
                        process.kill()
                        process.wait()
            _print(seconds)  # of the rounds so far: on a shared machine there may be no time for all
    finally:
        for child in children.values():
            child.kill()


def _started(variables: dict[str, str]) -> subprocess.Popen[str]:
    """A process that waits for work under `variables`; it has done each kind once."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    child = subprocess.Popen(
        [sys.executable, __file__, "--child"],
        env=environment | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for work in WORK:
        _ask(child, work)
    return child


def _ask(child: subprocess.Popen[str], work: str) -> float:
    assert child.stdin is not None
    assert child.stdout is not None
    print(work, file=child.stdin, flush=True)
    return float(child.stdout.readline())


def _serve_parent() -> None:
    """Do what the lines on standard input ask for, and answer with the seconds it took."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    table = tomllib.loads((resources.files("zili.config") / "quickstart.toml").read_text(encoding="utf-8"))
    works = {"train": _training(table), "serve": _serving(table)}
    for line in sys.stdin:
        started = time.perf_counter()
        works[line.strip()]()
        print(time.perf_counter() - started, flush=True)


def _training(table: dict) -> Callable[[], None]:
    import torch

    from zili import chips, ops
    from zili.chips.device import Device
    from zili.config import build_config
    from zili.data.loader import Batch
    from zili.training.trainer import Trainer

    rows, length = table["training"]["global_batch"], table["training"]["sequence_length"]
    recipe = build_config(
        table
        | {
            "data": {"sources": [{"store": "none"}], "tokenizer": "none"},
            "training": table["training"] | {"steps": 10**6, "micro_batch": rows},
            "chip": {"name": "cpu", "precision": "fp32", "compile": True},
        },
        origin="benchmark",
    )
    ops.choose("cpu", "fp32", {"linear": "onednn", "attention": "blocked"})
    # The environment is the child's own, so nothing but torch's and the C library's settings come from here.
    device = Device(chips.Activation(chips.find_backend("cpu"), torch.device("cpu"), 1, (), (), None, {}, ()))
    trainer = Trainer(recipe, None, device)  # type: ignore[arg-type]  # batches come from here
    trainer.model.train()
    tokens = torch.randint(recipe.model.vocab_size, (rows, length + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(rows, length, dtype=torch.int32))

    def work() -> None:
        for _ in range(STEPS):
            trainer.train_step(batch)

    return work


def _serving(table: dict) -> Callable[[], None]:
    from zili.config import ModelConfig
    from zili.models.decoder import Decoder
    from zili.serving.generate.engine import Ask, Engine

    engine = Engine(Decoder(ModelConfig(**table["model"])), slots=CONVERSATIONS, context=256)

    def work() -> None:
        answers = [engine.submit(Ask([1 + number] * 8, ANSWER)) for number in range(CONVERSATIONS)]
        for answer in answers:
            answer.wait()

    return work


def _print(seconds: dict[tuple[str, str, int], list[float]]) -> None:
    plain = next(iter(SETTINGS))
    rounds = len(next(iter(seconds.values())))
    for work in WORK:
        print(f"\n| {work}, {rounds} rounds | " + " | ".join(f"beside {count}" for count in BESIDE) + " |")
        print("| --- |" + " --- |" * len(BESIDE))
        base = seconds[work, plain, 0]
        for name in SETTINGS:
            shares = [
                median(one / other for one, other in zip(base, seconds[work, name, count], strict=True))
                for count in BESIDE
            ]
            print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
