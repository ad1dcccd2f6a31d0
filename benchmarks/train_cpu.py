"""Training speed on the CPU, side by side with Hugging Face transformers' Llama of the same shape.

    python benchmarks/train_cpu.py W1 --rounds 12
    python benchmarks/train_cpu.py W2 --rounds 10
    python benchmarks/train_cpu.py W1 --rounds 12 --precision bf16

Both train the same model from the same weights on the same batches: fp32, or under autocast to bf16, AdamW (fused),
clipping at 1.0. They take turns, one step each, with the machine's matrix product timed before and after every step,
so that a drift of the machine's speed falls on both. Printed are medians over the rounds: tokens/s, GFLOP/s, and the
share of two rates of a 2048^3 product of that precision measured beside the step: torch's own (`torch.mm`), and the
fastest found (`zili.ops`).

FLOPs a token: 6 N + 6 L S H d (`zili.models.arithmetic.training_flops_per_token`), for both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

from zili import chips
from zili.chips.device import Device
from zili.config import ModelConfig

if TYPE_CHECKING:
    import torch

SHAPES: dict[str, tuple[dict[str, int], int, int]] = {
    "W1": (
        {"hidden_size": 384, "layers": 8, "heads": 6, "kv_heads": 2, "ffn_hidden_size": 1024, "vocab_size": 16384},
        512,
        8,
    ),
    "W2": (
        {"hidden_size": 768, "layers": 12, "heads": 12, "kv_heads": 4, "ffn_hidden_size": 2048, "vocab_size": 32768},
        1024,
        2,
    ),
}
"""Model, sequence length, sequences a step."""
EQUAL_STEPS = 20
LEARNING_RATE = 3e-4
LARGEST_DIFFERENCE = {"fp32": 1e-3, "bf16": 1e-2}
"""Of two losses at one step, relative, by precision."""


def main() -> None:
    arguments = _arguments()
    activation = chips.activate(chips.find_backend("cpu"))  # sets the environment before torch is imported
    import torch

    from zili import ops
    from zili.models.arithmetic import training_flops_per_token

    shape, length, batch = SHAPES[arguments.workload]
    config = ModelConfig(head_dim=64, max_length=length, **shape)
    print(f"{arguments.workload}: {shape}, sequence {length}, {batch} a step; {Device(activation).name()}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for choice in ops.choose("cpu", arguments.precision, {}):
        print("  {} = {} ({})".format(*choice))
    torch.manual_seed(0)
    batches = [torch.randint(config.vocab_size, (batch, length + 1)) for _ in range(EQUAL_STEPS)]
    ours = _ours(config, batches, arguments.precision, compiled=not arguments.eager)
    theirs = _transformers(config, batches, arguments.precision)
    _compare_losses(ours, theirs, LARGEST_DIFFERENCE[arguments.precision])
    flops = batch * length * training_flops_per_token(config, length)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    _race({"zili": ours, "transformers": theirs}, arguments.rounds, flops, batch * length, dtype)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--precision", choices=LARGEST_DIFFERENCE, default="fp32")
    parser.add_argument("--eager", action="store_true", help="do not compile our blocks")
    return parser.parse_args()


Step = Callable[[int], float]
"""Takes the number of a batch, does one optimizer step on it, returns the loss."""


def _ours(config: ModelConfig, batches: list, precision: str, *, compiled: bool) -> Step:
    """The trainer's own step, on fixed batches."""
    import torch

    from zili.config import build_config
    from zili.data.loader import Batch
    from zili.training.trainer import Trainer

    rows, width = batches[0].shape
    recipe = build_config(
        {
            "model": config.model_dump(exclude_none=True),
            "data": {"sources": [{"store": "none"}], "tokenizer": "none"},
            "training": {"steps": 10**6, "sequence_length": width - 1, "global_batch": rows, "micro_batch": rows},
            "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": 0.1, "clip": 1.0},
            "schedule": {"kind": "constant"},
            "chip": {"name": "cpu", "precision": precision, "compile": compiled},
        },
        origin="benchmark",
    )
    device = Device(chips.activate(chips.find_backend("cpu")))
    trainer = Trainer(recipe, None, device)  # type: ignore[arg-type]  # batches come from here
    trainer.model.train()
    documents = torch.zeros(rows, width - 1, dtype=torch.int32)

    def step(number: int) -> float:
        tokens = batches[number % len(batches)]
        loss, _ = trainer.train_step(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents))
        return float(loss)

    return step


def _transformers(config: ModelConfig, batches: list, precision: str) -> Step:
    """The same of transformers' Llama, on the same batches."""
    import torch

    from zili.diagnosis.device_speed import transformers_step

    step = transformers_step(config, torch.device("cpu"), precision)
    return lambda number: step(batches[number % len(batches)])


def _compare_losses(ours: Step, theirs: Step, limit: float) -> None:
    """Both take the same 20 steps; they must follow one loss curve."""
    largest = 0.0
    for number in range(EQUAL_STEPS):
        a, b = ours(number), theirs(number)
        largest = max(largest, abs(a - b) / abs(b))
    print(f"losses over {EQUAL_STEPS} steps: largest relative difference {largest:.1e}; last {a:.6f} and {b:.6f}")
    if largest > limit:
        raise SystemExit(f"the losses differ by more than {limit:g}: the comparison would not be of the same work")


def _race(steps: dict[str, Step], rounds: int, flops: float, tokens: int, dtype: torch.dtype) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    shares: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            before = _products(dtype)
            started = time.perf_counter()
            step(number)
            taken = time.perf_counter() - started
            after = _products(dtype)
            seconds[name].append(taken)
            plain, best = ((x + y) / 2 for x, y in zip(before, after, strict=True))
            shares[name].append((flops / taken / plain, flops / taken / best))
    print(f"{rounds} rounds in turns, medians (smallest to largest):")
    for name, taken in seconds.items():
        rates = sorted(tokens / t for t in taken)
        of_plain, of_best = (median(column) for column in zip(*shares[name], strict=True))
        print(
            f"  {name:<13} {median(rates):7.0f} tokens/s ({rates[0]:.0f} to {rates[-1]:.0f})  "
            f"{flops / median(taken) / 1e9:5.0f} GFLOP/s  {of_plain:4.0%} of torch.mm  "
            f"{of_best:4.0%} of the fastest product"
        )
    ratios = sorted(b / a for a, b in zip(seconds["zili"], seconds["transformers"], strict=True))
    print(f"  zili over transformers, round by round: {median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def _products(dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a 2048^3 product of `dtype` now: torch.mm, and the best of it and zili's."""
    import torch

    from zili import ops

    size = 2048
    a, b = (matrix.to(dtype) for matrix in _matrices(size))
    rates = []
    for product in (torch.mm, ops.linear):
        fastest = float("inf")
        for _ in range(2):
            started = time.perf_counter()
            with torch.no_grad():
                product(a, b)
            fastest = min(fastest, time.perf_counter() - started)
        rates.append(2 * size**3 / fastest)
    return rates[0], max(rates)


def _matrices(size: int) -> tuple:
    import torch

    if not hasattr(_matrices, "kept"):
        _matrices.kept = (torch.randn(size, size), torch.randn(size, size))  # type: ignore[attr-defined]
    return _matrices.kept  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
