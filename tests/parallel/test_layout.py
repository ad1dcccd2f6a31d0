"""Which process has what, and what cannot be laid out: arithmetic, without processes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, product
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from zili.chips.device import Device
from zili.config import RunConfig
from zili.config.parallel import ParallelConfig
from zili.errors import ConfigError, LayoutError
from zili.parallel.context import pieces
from zili.parallel.layout import Layout, lay_out, processes, stage_ranges, stages_of
from zili.parallel.world import World

Recipe = Callable[..., RunConfig]
SIZES = (
    "model.hidden_size=64",
    "model.layers=4",
    "model.heads=8",
    "model.kv_heads=4",
    "model.head_dim=8",
    "model.ffn_hidden_size=96",
    "training.sequence_length=64",
    "training.global_batch=16",
    "training.micro_batch=2",
)
MIXTURE = "model.mixture={experts=8, top_k=2, ffn_hidden_size=32}"

FITS = {
    "": (1, "one process"),
    "shards=4": (4, "shards 4"),
    "replicas=2 tensor=2": (8, "replicas 2 x shards 2 x tensor 2"),
    "tensor=4 context=2 pipeline=2": (16, "pipeline 2 x context 2 x tensor 4"),
    "pipeline=2 schedule=zbv": (2, "pipeline 2"),
}


@pytest.mark.parametrize("table", FITS)
def test_what_is_left_open_is_what_the_other_dimensions_leave(recipe: Recipe, table: str) -> None:
    world, words = FITS[table]
    layout = lay_out(asked(recipe, table), world)
    assert (layout.world, str(layout)) == (world, words)


REFUSED: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "a world too small": ("shards=4", 2, ("asks for 4 processes", "shards 4", "2 are running", "start 4")),
    "one process": ("tensor=2 shards=1", 1, ("asks for 2 processes", "1 is running", "start 2")),
    "a world too large": ("shards=2 tensor=2", 8, ("asks for 4", "8 are running", "parallel.shards = 4")),
    "a world not divided": ("tensor=4", 6, ("6 processes cannot be divided", "= 4", "start a multiple of 4")),
    "heads": ("tensor=3", 3, ("parallel.tensor 3 does not divide model.heads 8", "are 2 and 4")),
    "kv_heads": ("tensor=8", 8, ("parallel.tensor 8 does not divide model.kv_heads 4", "are 4")),
    "ffn": ("tensor=4 model.ffn_hidden_size=90", 4, ("model.ffn_hidden_size 90", "are 3 and 5")),
    "vocabulary": ("tensor=4 model.vocab_size=302", 4, ("model.vocab_size 302", "are 2 and 151")),
    "context": (
        "context=3",
        3,
        ("twice parallel.context 6 does not divide training.sequence_length 64", "are 4 and 8"),
    ),
    "tokens of a process": (
        "tensor=4 context=2 training.sequence_length=12",
        8,
        ("parallel.tensor 4 does not divide the tokens of a process in a sequence 6", "are 3 and 6"),
    ),
    "more stages than layers": ("pipeline=8", 8, ("8 stages (parallel.pipeline 8 x 1 each) for 4 layers",)),
    "more stages each": (
        "pipeline=2 schedule=interleaved stages_per_process=3",
        2,
        ("6 stages (parallel.pipeline 2 x 3 each) for 4 layers",),
    ),
    "stage_layers": ("pipeline=2 stage_layers=[1,2]", 2, ("[1, 2] adds up to 3, model.layers is 4",)),
    "no mixture": ("expert=2 shards=2", 2, ("parallel.expert 2, and the model has no experts", "leave it at 1")),
    "experts": (
        f"expert=3 shards=3 training.global_batch=18 {MIXTURE}",
        3,
        ("parallel.expert 3 does not divide model.mixture.experts 8", "are 2 and 4"),
    ),
    "those who share experts": (
        f"expert=4 shards=2 {MIXTURE}",
        2,
        ("parallel.expert 4 does not divide shards x context x tensor 2", "are 2"),
    ),
    "batch": ("shards=3", 3, ("replicas x shards 3 does not divide training.global_batch 16", "are 2 and 4")),
    "micro-batch": (
        "shards=8 training.micro_batch=4",
        8,
        ("training.micro_batch 4 does not divide the samples of a process in a step 2", "are 2"),
    ),
    "too few micro-batches": (
        "shards=2 pipeline=2 training.micro_batch=8",
        4,
        ("a pipeline of 2 processes", "has 1 of 8 samples", "training.global_batch to 32"),
    ),
    "a V with tied embeddings": (
        "pipeline=2 schedule=zbv model.tied_embeddings=true",
        2,
        ("zbv", "model.tied_embeddings", "take zero_bubble"),
    ),
    "recomputation for half a backward pass": (
        "pipeline=2 schedule=zero_bubble training.recompute=full",
        2,
        ("zero_bubble", 'training.recompute "full"', 'more memory than "none"'),
    ),
    "a V with multi-token prediction": ("pipeline=2 schedule=zbv model.mtp_layers=1", 2, ("zbv", "model.mtp_layers")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_does_not_fit_is_refused_with_the_numbers(recipe: Recipe, case: str) -> None:
    table, world, parts = REFUSED[case]
    with pytest.raises(LayoutError) as refused:
        lay_out(asked(recipe, table), world)
    missing = [part for part in parts if part not in str(refused.value)]
    assert not missing, str(refused.value)


def test_all_that_is_wrong_is_said_at_once(recipe: Recipe) -> None:
    with pytest.raises(LayoutError) as refused:
        lay_out(asked(recipe, "shards=3 tensor=3 expert=2"), 9)
    lines = str(refused.value).splitlines()
    assert lines[0] == "this layout (shards 3 x tensor 3 x expert 2) cannot be run:"
    for name in ("model.heads", "model.kv_heads", "model.vocab_size", "training.global_batch", "no experts"):
        assert any(name in line for line in lines[1:]), name


@pytest.mark.parametrize(
    ("table", "part"),
    [
        ("schedule=interleaved stages_per_process=1", "schedule interleaved takes stages_per_process 2 or more, not 1"),
        ("schedule=1f1b stages_per_process=2", "schedule 1f1b takes stages_per_process 1, not 2"),
        ("schedule=zbv stages_per_process=3", "schedule zbv takes stages_per_process 2, not 3"),
        ("stage_layers=[4]", "stage_layers has 1 entries, the pipeline 2 stages (2 processes x 1)"),
    ],
)
def test_a_table_that_no_world_fits_is_no_configuration(recipe: Recipe, table: str, part: str) -> None:
    with pytest.raises(ConfigError) as refused:
        asked(recipe, f"pipeline=2 {table}")
    assert part in str(refused.value)


def test_processes_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert processes() == (0, 1, 0)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes() == (9, 16, 1)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(LayoutError, match=r"WORLD_SIZE.*'many'.*torchrun"):
        processes()


@pytest.mark.parametrize("layers", range(4, 14))
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_have_every_layer_once_and_the_ends_are_no_longer_than_the_middle(layers: int, stages: int) -> None:
    ranges = stage_ranges(ParallelConfig(pipeline=stages), layers)
    assert list(chain.from_iterable(ranges)) == list(range(layers))
    sizes = [len(layers_of_stage) for layers_of_stage in ranges]
    assert max(sizes) - min(sizes) <= 1
    if stages > 2:
        assert max(sizes[0], sizes[-1]) <= min(sizes[1:-1])


def test_stages_have_the_layers_asked_for() -> None:
    uneven = ParallelConfig(pipeline=3, stage_layers=(1, 5, 2))
    assert stage_ranges(uneven, 8) == [range(0, 1), range(1, 6), range(6, 8)]


@pytest.mark.parametrize("pipeline", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("schedule", "each"), [("1f1b", 1), ("interleaved", 3), ("zero_bubble", 2), ("zbv", 2)])
def test_every_stage_is_on_one_process(pipeline: int, schedule: Any, each: int) -> None:
    parallel = ParallelConfig(pipeline=pipeline, schedule=schedule, stages_per_process=each)
    own = [stages_of(parallel, process) for process in range(pipeline)]
    assert {len(stages) for stages in own} == {each}
    assert sorted(chain.from_iterable(own)) == list(range(pipeline * each))
    assert own[0][0] == 0
    # In a V the process that begins also ends; elsewhere the last one does.
    assert pipeline * each - 1 in own[0 if schedule == "zbv" else -1]


@pytest.mark.parametrize("sizes", [*product((1, 2), repeat=5), (1, 3, 2, 1, 1), (2, 1, 4, 2, 2)])
def test_every_row_is_read_once_by_all_who_share_it(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    layout = Layout(*sizes)
    batch = 12 * layout.data
    readers = [0] * batch
    places = set()
    for rank in range(layout.world):
        world = world_of(monkeypatch, layout, rank)
        rows = range(batch)[world.rows(batch)]
        assert len(rows) == 12
        for row in rows:
            readers[row] += 1
        places.add((world.pipeline_rank, rows.start, world.context_rank, world.tensor_rank))
    assert set(readers) == {layout.pipeline * layout.context * layout.tensor}
    assert len(places) == layout.world, "no two processes have the same to do"


def test_neighbours_share_matrices_and_the_farthest_are_of_other_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(pipeline=2, shards=2, tensor=2)
    found = [world_of(monkeypatch, layout, rank) for rank in range(8)]
    assert [world.tensor_rank for world in found] == [0, 1] * 4
    assert [world.rows(2).start for world in found] == [0, 0, 1, 1] * 2
    assert [world.pipeline_rank for world in found] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("width", [1, 5])
def test_pieces_of_a_sequence_have_every_position_once_and_equal_work(size: int, width: int) -> None:
    length = 2 * size * width
    own = [list(chain.from_iterable(pieces(length, size, rank))) for rank in range(size)]
    assert sorted(chain.from_iterable(own)) == list(range(length))
    # Position p sees p + 1 keys.
    work = {sum(position + 1 for position in positions) for positions in own}
    assert work == {length * (length + 1) // 2 // size}


def asked(recipe: Recipe, table: str) -> RunConfig:
    """`table` as in `shards=2 model.layers=3`; what has no dot is of `[parallel]`."""
    joined = table.replace(", ", ",")
    parts = [part if "." in part.partition("=")[0] else f"parallel.{part}" for part in joined.split()]
    return recipe(*SIZES, *parts)


def world_of(monkeypatch: pytest.MonkeyPatch, layout: Layout, rank: int) -> World:
    """The place of process `rank`, without the others."""
    monkeypatch.setattr(World, "_make_meshes", lambda self: None)
    monkeypatch.setattr("zili.parallel.world.dist.get_rank", lambda: rank)
    return World(layout, cast(Device, SimpleNamespace(type="cpu", torch=torch.device("cpu"))))
