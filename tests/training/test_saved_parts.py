"""What each process writes of a checkpoint: every element once, known from the layout alone, found by an index."""

from __future__ import annotations

import json
import pickle
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import forks
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from zili.checksums import dealt
from zili.errors import CheckpointError
from zili.torch_private import StridedShard
from zili.training import parts as parts_module
from zili.training.index import Box, Place, TensorIndex, read_header, read_index, shard_of
from zili.training.parts import box_of, parts_to_write, write_parts
from zili.training.restoring import one_process

COPY, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)


def after(tensor: int) -> Any:
    """What FSDP2 makes of rows that tensor parallel cuts over so many processes already."""
    return StridedShard(0, split_factor=tensor)


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "shards": ((4,), (ROWS,)),
    "copies": ((3,), (COPY,)),
    "copies of shards": ((2, 3), (COPY, ROWS)),
    "shards, then rows": ((3, 2), (after(2), ROWS)),
    "shards, then columns": ((2, 3), (ROWS, COLUMNS)),
    "shards, then copies": ((2, 3), (ROWS, COPY)),
    "copies of shards, then rows": ((2, 2, 2), (COPY, after(2), ROWS)),
}
HEIGHTS = (12, 10, 2)
"""Rows of matrices: some leave processes with less than others, or with nothing. All can be cut by tensor parallel."""


def local_part(whole: Tensor, sizes: tuple[int, ...], placements: tuple[Any, ...], place: tuple[int, ...]) -> Tensor:
    """The part that the process at `place` has, cut as tensor parallel does first and FSDP2 then."""
    for size, placement, number in reversed(list(zip(sizes, placements, place, strict=True))):
        if not placement.is_replicate():
            pieces = whole.chunk(size, placement.dim)
            whole = pieces[number] if number < len(pieces) else whole.narrow(placement.dim, 0, 0)
    return whole.contiguous()


def tensors_of(rank: int, sizes: tuple[int, ...], placements: tuple[Any, ...]) -> dict[str, Tensor]:
    """What process `rank` has: matrices cut over the processes, a plain one that all have, and one of its own."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple("abc"[: len(sizes)]))
    found: dict[str, Tensor] = {}
    for name, whole in matrices().items():
        local = local_part(whole, sizes, placements, tuple(mesh.get_coordinate() or ()))
        found[name] = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return {**found, **plain(), f"rng.{rank}": torch.tensor([rank])}


def matrices() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"model.{height}.{number}": torch.randn(height, 6) for height in HEIGHTS for number in range(2)}


def plain() -> dict[str, Tensor]:
    return {"model.plain": torch.arange(40.0), "model.step": torch.ones(1)}


def write_all(folder: Path, layout: str, small: int) -> list[int]:
    """Write the files of all processes, one after another; returns the bytes of each one's parts."""
    sizes, placements = LAYOUTS[layout]
    found = []
    for rank in range(prod(sizes)):
        dist.init_process_group("fake", rank=rank, world_size=prod(sizes), store=FakeStore())
        shape: Any = SimpleNamespace(pipeline=1)
        world: Any = SimpleNamespace(rank=rank, size=prod(sizes), pipeline_rank=0, layout=shape)
        with mock.patch.object(parts_module, "_SMALL", small):
            parts = parts_to_write(tensors_of(rank, sizes, placements), world, lambda key: key.startswith("rng."))
        if parts:
            write_parts(folder / f"shard-{rank}.safetensors", parts)
        found.append(sum(part.tensor.nbytes for part in parts.values()))
        dist.destroy_process_group()
    return found


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors, by torch's own reader, which knows nothing of an index."""
    entries = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {name: torch.full(entry.size, -1, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with one_process():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def refused(height: int) -> bool:
    """Whether a process notices that torch places a matrix wrongly which tensor parallel cuts unevenly."""
    sizes, placements = LAYOUTS["shards, then rows"]
    with mock.patch(f"{__name__}.HEIGHTS", (height,)):
        for rank in range(prod(sizes)):
            dist.init_process_group("fake", rank=rank, world_size=prod(sizes), store=FakeStore())
            try:
                box_of(tensors_of(rank, sizes, placements)[f"model.{height}.0"])
            except AssertionError:
                return True
            finally:
                dist.destroy_process_group()
    return False


def each_layout(folder: Path) -> None:
    assert refused(7) and not refused(8)
    found = {}
    for layout in LAYOUTS:
        for small in (0, 1 << 20):
            (folder / f"{layout} {small}").mkdir()
            found[f"{layout} {small}"] = write_all(folder / f"{layout} {small}", layout, small)
    (folder / "written.json").write_text(json.dumps(found))


def test_torch_reads_every_layout_whole_and_each_part_was_written_once(tmp_path: Path) -> None:
    # In a process whose groups are nobody else's.
    process = forks.context().Process(target=each_layout, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    written = json.loads((tmp_path / "written.json").read_text())
    for layout, (sizes, placements) in LAYOUTS.items():
        world = prod(sizes)
        wanted = {**matrices(), **plain(), **{f"rng.{rank}": torch.tensor([rank]) for rank in range(world)}}
        for small in (0, 1 << 20):
            folder, loads = tmp_path / f"{layout} {small}", written[f"{layout} {small}"]
            found = read_whole(folder)
            assert found.keys() == wanted.keys()
            assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == [], layout
            assert sum(loads) == sum(tensor.nbytes for tensor in wanted.values()), "nothing twice"
            read_index(folder).check_whole()
        copies = prod(size for size, placement in zip(sizes, placements, strict=True) if placement.is_replicate())
        if copies == world:
            largest = max(tensor.nbytes for tensor in wanted.values())
            even = written[f"{layout} 0"]
            assert max(even) - min(even) <= 2 * largest, "copies share the work"
            assert written[f"{layout} {1 << 20}"][1:] == [8] * (world - 1), "small parts are the first one's"


def index_of(*headers: dict[str, Place]) -> TensorIndex:
    shards = [shard_of(header) for header in headers]
    tables = [shard.cut for shard in shards]
    return TensorIndex(tables, {str(number): (number, one.whole, one.places) for number, one in enumerate(shards)})


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ([{"w": (0, 4)}, {"w": (8, 2)}], "6 of 10 elements of w"),
        ([{"w": (0, 4)}, {"w": (4, 6)}, {"w": (0, 4)}], "14 of 10 elements of w"),
        ([{"w": (0, 10)}, {"w": (0, 10)}], "2 whole tensors were written where there are 1"),
        ([{"w": (0, 10)}, {"w": (2, 3)}], "3 of 10 elements of w"),
    ],
)
def test_a_checkpoint_with_a_hole_or_a_part_twice_is_refused(headers: list[Any], said: str) -> None:
    made = [{name: Place("F32", (10,), Box((a,), (b,))) for name, (a, b) in one.items()} for one in headers]
    with pytest.raises(CheckpointError, match=said):
        index_of(*made).check_whole()


def test_an_index_finds_the_parts_that_a_box_meets() -> None:
    place = {file: {"w": Place("F32", (10, 4), Box((5 * file, 0), (5, 4)))} for file in range(2)}
    index = index_of({**place[0], "b": Place("U8", (3,), Box((0,), (3,)))}, place[1])
    index.check_whole()
    for one in (index, pickle.loads(pickle.dumps(index))):
        assert sorted(one.names()) == ["b", "w"] and "w" in one and "x" not in one
        assert (one.size("w"), one.dtype("b")) == ((10, 4), torch.uint8)
        assert [part.file for part in one.parts("w")] == ["0", "1"]
        assert [part.file for part in one.parts("w", Box((5, 1), (2, 2)))] == ["1"]
        assert [part.file for part in one.parts("w", Box((4, 0), (2, 1)))] == ["0", "1"]
        assert one.parts("w", Box((4, 0), (0, 4))) == []
        assert [part.file for part in one.parts("b")] == ["0"]


def test_an_index_of_ten_thousand_files_is_a_few_megabytes() -> None:
    """A thousand tensors of eight shapes in each of them: ten million parts. A tenth of the files is enough to see."""
    table = {f"optimizer.layers.{layer}.attention.query.{of}": layer % 8 for layer in range(500) for of in "ab"}
    files = {
        f"shard-{file:05d}.safetensors": (
            0,
            {f"rng.cpu.{file}": 8},
            [
                *(Place("F32", (40960, 8192), Box((4 * file, 0), (4, 8192 - shape))) for shape in range(8)),
                Place("U8", (5056,), Box((0,), (5056,))),
            ],
        )
        for file in range(1024)
    }
    assert len(TensorIndex([table], files).text()) < 0.7e6


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.pop("tables"),
        lambda raw: raw.update(format=9),
        lambda raw: next(iter(raw["files"].values())).update(table=7),
        lambda raw: next(iter(raw["files"].values())).update(places=[["F32"]]),
        lambda raw: next(iter(raw["files"].values())).update(whole={"x": 99}),
        lambda raw: raw.update(files=[1]),
    ],
)
def test_a_broken_index_is_an_error_of_the_checkpoint(tmp_path: Path, damage: Any) -> None:
    index = index_of({"w": Place("F32", (10,), Box((0,), (10,)))})
    (tmp_path / "index.json").write_text(index.text())
    assert read_index(tmp_path).names() == ["w"]
    raw = json.loads(index.text())
    damage(raw)
    (tmp_path / "index.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"index.json cannot be read"):
        read_index(tmp_path)


def test_a_header_of_an_older_version_says_where_its_tensors_lie(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for number, offset in enumerate((0, 3)):
        said = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [offset, 0]}})}
        save_file({"w": torch.ones(3, 2)}, tmp_path / f"{number}.safetensors", said)
    assert read_header(tmp_path / "1.safetensors")["w"].box == Box((3, 0), (3, 2))
    index = read_index(tmp_path)
    assert index.size("w") == (6, 2) and len(index.parts("w")) == 2
    (tmp_path / "1.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"1.safetensors cannot be read"):
        read_index(tmp_path)


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 1000), max_size=20),
    st.integers(1, 7),
    st.data(),
)
def test_files_go_to_who_reads_them_and_to_nobody_too_many(
    sizes: dict[str, int], parts: int, data: st.DataObject
) -> None:
    near = {name: data.draw(st.lists(st.integers(0, parts - 1), max_size=4), label=name) for name in sizes}
    found = dealt(sizes, parts, near)
    assert found.keys() == sizes.keys() and set(found.values()) <= set(range(parts))
    loads = [sum(size for name, size in sizes.items() if found[name] == part) for part in range(parts)]
    mean = sum(sizes.values()) / parts
    assert max(loads) <= max(2 * mean, mean + max(sizes.values(), default=0)) + 1e-9
    alone = {name: [number % parts] for number, name in enumerate(sorted(sizes))}
    even = dealt(dict.fromkeys(sizes, 5), parts, alone)
    assert all(even[name] == alone[name][0] for name in sizes), "where the load is even, each goes to its reader"
