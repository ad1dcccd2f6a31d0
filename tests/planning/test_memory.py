"""The planner's memory is that of rehearsals, which is that of a device's allocator (tests/chips/emulated)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from many import on_processes
from tiny_models import slow, taught_by, tiny_recipe

from zili import chips
from zili.config import RunConfig
from zili.parallel.layout import lay_out
from zili.planning.exact.job import Job
from zili.planning.exact.memory import PARTS, Peaks
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
    reduce = dice.choice(("step", "micro_batch"))
    schedule = dice.choice(("1f1b", "interleaved", "zero_bubble", "zbv")) if pipeline > 1 else "1f1b"
    halves = schedule in ("zero_bubble", "zbv")
    # Passes cut in two keep what recomputation would not, and run an exchange's gradients twice: formulas leave both
    # out. They are for pipelines with twice as many micro-batches as processes, or more.
    if (halves and (mixture or recompute != "none" or reduce == "micro_batch")) or pipeline * (
        1 if schedule == "1f1b" else 2
    ) > layers:
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
        f"parallel.reduce={reduce}",
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


def rehearsed(config: RunConfig, world: int, rank: int, backend: str = "ascend") -> int:
    from zili.rehearsal import rehearse

    return rehearse(config, world, rank, backend=chips.find_backend(backend), micro_batches=64).peak.bytes


def off(case: Case, folder: Path, *, on_host: bool = False) -> float:
    """The planner's bytes over those of a rehearsal, less one."""
    config = tiny_recipe("dense", folder, folder / "run", *case.overrides)
    operations = {"attention": "reference"} if on_host else {}
    config = config.model_copy(update={"chip": config.chip.model_copy(update={"operations": operations})})
    layout = lay_out(config, case.world)
    rank = case.place * (case.world // layout.pipeline)
    (truth,) = on_processes(1, rehearsed, config, case.world, rank, "cpu" if on_host else "ascend")
    sharded, grouped = (config.chip.capabilities.get(name, True) for name in ("fsdp2", "grouped_heads_attention"))
    job = Job(config, layout, case.place, sharded, grouped, on_host)
    return sum(Peaks(job).at(job.place).values()) / truth - 1


def check(cases: Sequence[Case], folder: Path, *, on_host: bool = False) -> list[float]:
    """All within `WITHIN`."""
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(partial(off, folder=folder, on_host=on_host), cases))
    strays = [f"{error:+.1%}: {case}" for case, error in zip(cases, errors, strict=True) if abs(error) > WITHIN]
    assert not strays, "\n".join(strays)
    return errors


@pytest.mark.parametrize("which", [(2, 20, 29), slow(range(40))])
def test_layouts_drawn_at_random(
    which: Sequence[int], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The three have few layers and micro-batches, and yet shards, replicas, tensors, pipelines, a mixture with latent
    attention, both precisions and each recomputation."""
    dice = random.Random(5)
    cases: list[Case] = []
    while len(cases) <= max(which):
        case = drawn(dice)
        cases += [case] if case else []
    cases = [cases[number] for number in which]
    errors = check(cases, tmp_path)
    record_property("worst", f"{max(map(abs, errors)):.2%}")
    assert sum(map(abs, errors)) / len(cases) < WITHIN / 3


SIZES = (
    *("model.vocab_size=4096", "model.hidden_size=512", "model.head_dim=64", "model.ffn_hidden_size=1024"),
    *("model.kv_heads=8", "model.max_length=8192", "training.sequence_length=256", "training.micro_batch=1"),
    "model.layers=3",
)
LOGITS = ("model.vocab_size=131072", "training.micro_batch=4", "training.sequence_length=2048", "model.layers=1")
PAIRS = ("preference.beta=0.1", "training.start_from=nothing", "model.mtp_layers=1")
NARROW = "model.mixture={experts=6, top_k=2, ffn_hidden_size=250, shared_experts=0, dense_layers=1}"
REPEATED = ("chip.capabilities.grouped_heads_attention=false", "model.kv_heads=1", "model.hidden_size=256")
_TEACHER = taught_by(
    "dense", vocab_size=4096, hidden_size=1024, head_dim=64, ffn_hidden_size=2048, kv_heads=8, max_length=8192
)
FEATURES = {
    "adapters": Case(("model.lora.rank=8",), 1, 0),
    "adapters in a pipeline": Case(("model.lora.rank=8", "parallel.pipeline=2"), 2, 1),
    "more logits than at a time": Case(LOGITS, 2, 0),
    "the same, cut": Case((*LOGITS, "training.micro_batch=8", "parallel.tensor=2"), 2, 0),
    "two losses of a large vocabulary": Case(("model.mtp_layers=1", "model.vocab_size=65536"), 2, 0),
    "pairs, and a loss that is not theirs": Case(PAIRS, 1, 0),
    "Muon": Case(("optimizer.name=muon",), 4, 0),
    "experts of a width that is not aligned": Case((NARROW,), 4, 0),
    "a teacher": Case((_TEACHER,), 4, 0),
    "a teacher in a pipeline": Case((_TEACHER, "parallel.pipeline=2", "parallel.shards=2"), 4, 1),
    "heads that are repeated": Case((*REPEATED, "training.micro_batch=16"), 1, 0),
    "gradients summed after each": Case(("parallel.reduce=micro_batch",), 2, 0),
    "the same in a pipeline": Case(("parallel.reduce=micro_batch", "parallel.pipeline=2", "parallel.shards=2"), 4, 1),
}


_LONG = ("adapters in a pipeline", "the same, cut", "pairs, and a loss that is not theirs", "the same in a pipeline")


def in_short(case: Case) -> Case:
    """A first, a next and a last micro-batch of each process are all that differ; of a pipeline's twice as many."""
    (*_, micro) = (text.partition("=")[2] for text in case.overrides if text.startswith("training.micro_batch="))
    batch = f"training.global_batch={3 * case.world * int(micro)}"
    return case._replace(overrides=(*case.overrides, batch))


@pytest.mark.parametrize("name", [slow(name) if name in _LONG else name for name in FEATURES])
def test_a_feature(name: str, tmp_path: Path) -> None:
    case = FEATURES[name]
    check([in_short(case._replace(overrides=("chip.precision=bf16", *SIZES, *case.overrides)))], tmp_path)


def test_the_host_and_a_chip_without_shards(tmp_path: Path) -> None:
    whole = "chip.capabilities.fsdp2=false"
    cases = [
        Case(SIZES, 1, 0),
        Case((*SIZES, "training.sequence_length=2048"), 1, 0),
        Case((*SIZES, "parallel.pipeline=2", whole), 2, 1),
        Case((*SIZES, "chip.precision=bf16", "parallel.shards=2", whole), 2, 0),
    ]
    check(list(map(in_short, cases)), tmp_path, on_host=True)


@pytest.mark.slow
def test_copies_for_tiers(tmp_path: Path) -> None:
    tiers = 'checkpoint.tiers=[{place="/scratch", every=1}, {place="s3://bucket", every=5}]'
    check([in_short(Case((*SIZES, tiers), 1, 0))], tmp_path, on_host=True)


@pytest.mark.parametrize("schedule", [slow("1f1b"), "interleaved", slow("zero_bubble"), "zbv"])
def test_a_pipeline_keeps_no_more_for_more_micro_batches(schedule: str, tmp_path: Path) -> None:
    """Buffers of messages, what was sent, gradients: of eight micro-batches as many as of six, tokens apart, for which
    all that a schedule has in flight at once has come."""
    peaks = []
    for count in (6, 8):
        stages = ("model.layers=4", "parallel.pipeline=2", f"parallel.schedule={schedule}")
        overrides = (*SIZES, *stages, f"training.global_batch={count}")
        config = tiny_recipe("dense", tmp_path, tmp_path / "run", *overrides)
        (peak,) = on_processes(1, rehearsed, config, 2, 0)
        peaks.append(peak - count * 256 * 20)
    assert peaks[0] == pytest.approx(peaks[1], abs=4096)


def exchanged(config: RunConfig) -> dict[str, int]:
    """Messages of an optimizer by kind: those of a step with it, less those of AdamW."""
    from zili.rehearsal import rehearse

    messages = rehearse(config, 4, backend=chips.find_backend("ascend")).messages
    return {kind: sum(n for m, n in messages.items() if m.kind == kind) for kind in ("all_to_all", "all_gather")}


def test_matrices_are_exchanged_for_muon_as_a_chip_does_it(tmp_path: Path) -> None:
    """Two exchanges of each kind of matrix, `zili.training.muon` says: four in a layer, of which two have one shape."""
    found = {}
    for name in ("adamw", "muon"):
        config = tiny_recipe(
            "dense", tmp_path, tmp_path / "run", *SIZES, "training.global_batch=4", f"optimizer.name={name}"
        )
        (found[name],) = on_processes(1, exchanged, config)
    assert found["adamw"]["all_to_all"] == 0
    assert found["muon"]["all_to_all"] == 2 * 3  # square ones; gates and ups; downs
    assert found["muon"]["all_gather"] == found["adamw"]["all_gather"]


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
    first, second = (sum(Peaks(Job(config, lay_out(config, 1))).at(0).values()) for config in (small, large))
    assert second > first
