"""The planner's memory is that of rehearsals, which is that of a device's allocator (tests/chips/emulated)."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from many import on_processes
from tiny_models import slow, tiny_recipe

from zili import chips
from zili.config import RunConfig
from zili.parallel.layout import lay_out
from zili.planning.job import Job
from zili.planning.memory import PARTS, peak_bytes
from zili.rehearsal.recorder import PARTS as REHEARSED_PARTS

WITHIN = 0.05
LATENT = "model.latent={query_rank=128, key_value_rank=96, rope_head_dim=32, value_head_dim=64}"


class Case(NamedTuple):
    """A recipe's overrides, and which process of how many to be."""

    overrides: tuple[str, ...]
    world: int
    place: int


def drawn(dice: random.Random) -> Case | None:
    """A model, a batch and a layout; None where they do not go together."""
    layers, hidden, heads = dice.choice((4, 6, 8)), dice.choice((256, 512, 768)), dice.choice((4, 8))
    ffn, vocabulary, sequence = dice.choice((512, 1024, 2048)), dice.choice((1024, 4096, 8192)), dice.choice((128, 256))
    tensor, context, shards = dice.choice((1, 1, 2, 4)), dice.choice((1, 1, 1, 2)), dice.choice((1, 2, 4))
    replicas, pipeline, micro = dice.choice((1, 1, 2)), dice.choice((1, 1, 2, 4)), dice.choice((1, 2))
    recompute, mixture = dice.choice(("none", "none", "full", "selective")), dice.random() < 0.35
    schedule = dice.choice(("1f1b", "interleaved", "zero_bubble", "zbv")) if pipeline > 1 else "1f1b"
    halves = schedule in ("zero_bubble", "zbv")
    # Passes cut in two keep what recomputation would not, and run an exchange's gradients twice: formulas leave both
    # out. They are for pipelines with twice as many micro-batches as processes, or more.
    if (halves and (mixture or recompute != "none")) or pipeline * (1 if schedule == "1f1b" else 2) > layers:
        return None
    count = pipeline * dice.choice((2, 3) if halves else (1, 2, 3)) if pipeline > 1 else dice.choice((1, 2, 3, 4))
    overrides = [
        *(f"model.layers={layers}", f"model.hidden_size={hidden}", f"model.heads={heads}"),
        *(f"model.head_dim={hidden // heads}", f"model.ffn_hidden_size={ffn}", f"model.vocab_size={vocabulary}"),
        "model.max_length=256",
        *(f"training.sequence_length={sequence}", f"training.micro_batch={micro}", f"training.recompute={recompute}"),
        f"training.global_batch={count * micro * shards * replicas}",
        *(f"parallel.tensor={tensor}", f"parallel.context={context}", f"parallel.pipeline={pipeline}"),
        *(f"parallel.shards={shards}", f"parallel.replicas={replicas}", f"parallel.schedule={schedule}"),
        f"chip.precision={dice.choice(('bf16', 'bf16', 'fp32'))}",
    ]
    if mixture:
        shared, expert = dice.choice((0, 1)), dice.choice((1, 2, 4, 8))
        if shards * context * tensor % expert:
            return None
        sizes = f"experts=8, top_k=2, ffn_hidden_size={ffn // 4}, shared_experts={shared}, dense_layers=1"
        overrides += [f"model.kv_heads={heads}", f"model.mixture={{{sizes}}}", f"parallel.expert={expert}"]
        overrides += [LATENT, "model.head_dim=96"] if dice.random() < 0.5 else []
    return Case(tuple(overrides), tensor * context * shards * replicas * pipeline, dice.randrange(pipeline))


def rehearsed(config: RunConfig, world: int, rank: int) -> int:
    from zili.rehearsal import rehearse

    return rehearse(config, world, rank, backend=chips.find_backend("ascend"), micro_batches=64).peak.bytes


@pytest.mark.parametrize("count", [12, slow(40)])
def test_layouts_drawn_at_random(count: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    dice = random.Random(5)
    cases: list[Case] = []
    while len(cases) < count:
        case = drawn(dice)
        cases += [case] if case else []

    def off(case: Case) -> float:
        config = tiny_recipe("dense", tmp_path, tmp_path / "run", *case.overrides)
        config = config.model_copy(update={"chip": config.chip.model_copy(update={"operations": {}})})
        layout = lay_out(config, case.world)
        (truth,) = on_processes(1, rehearsed, config, case.world, case.place * (case.world // layout.pipeline))
        return sum(peak_bytes(Job(config, layout, case.place)).values()) / truth - 1

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(off, cases))
    record_property("worst", f"{max(map(abs, errors)):.2%}")
    strays = [f"{error:+.1%}: {case}" for case, error in zip(cases, errors, strict=True) if abs(error) > WITHIN]
    assert not strays, "\n".join(strays)
    assert sum(map(abs, errors)) / count < WITHIN / 3


def test_parts_have_the_names_of_rehearsals() -> None:
    assert set(PARTS) == set(REHEARSED_PARTS)


@pytest.mark.parametrize("field", ["training.micro_batch=2", "training.recompute=none", "model.layers=8"])
def test_more_takes_more(field: str, tmp_path: Path) -> None:
    """Which way each of them goes is known without a rehearsal."""
    small = tiny_recipe("dense", tmp_path, tmp_path / "run", "training.micro_batch=1", "training.recompute=full")
    name, _, value = field.partition("=")
    section, _, key = name.partition(".")
    typed = int(value) if value.isdigit() else value
    large = small.model_copy(update={section: getattr(small, section).model_copy(update={key: typed})})
    first, second = (sum(peak_bytes(Job(config, lay_out(config, 1))).values()) for config in (small, large))
    assert second > first
