"""Reading a part of a tensor, of a sharded checkpoint, and into a model that is cut over processes."""

import hashlib
from functools import partial
from itertools import product

import forks
import pytest
import torch
from published_folders import PUBLISHED, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import zili
from zili.config import build_config
from zili.config.mixture import LatentConfig, MixtureConfig
from zili.config.model import ModelConfig
from zili.errors import CheckpointError
from zili.objectives import learner
from zili.release import export_model, fill_from, import_model, open_model, weights_fingerprint
from zili.release.tensors import Tensors

MIXTURE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    layers=3,
    heads=4,
    kv_heads=4,
    head_dim=12,
    ffn_hidden_size=48,
    mtp_layers=1,
    mixture=MixtureConfig(
        experts=8, top_k=2, ffn_hidden_size=16, shared_experts=1, dense_layers=1, scoring="sigmoid", bias=True
    ),
    latent=LatentConfig(query_rank=20, key_value_rank=12, rope_head_dim=4, value_head_dim=8),
)


def parts_of(shape):
    """Some parts of a tensor: halves of every dimension, one row of the first, and nothing."""
    halves = [[slice(0, size // 2), slice(size // 2, size)] for size in shape]
    whole = [slice(0, size) for size in shape]
    return [*product(*halves), (slice(shape[0] - 1, shape[0]), *whole[1:]), (slice(1, 1), *whole[1:])]


def check_parts(tensors: Tensors):
    for name, described in tensors.describe().items():
        whole = tensors.read(name)
        assert (whole.shape, whole.dtype) == (described.shape, described.dtype)
        for index in parts_of(whole.shape):
            assert torch.equal(tensors.read(name, index), whole[index]), (name, index)


@pytest.mark.parametrize("layout", PUBLISHED)
def test_parts_of_published_folders(publish, layout):
    check_parts(open_model(publish(layout)).tensors)


def test_parts_of_a_zili_folder_and_of_pickled_weights(publish, tmp_path):
    folder = publish("telechat2")
    import_model(folder, tmp_path / "zili", max_shard_bytes=6000)
    check_parts(open_model(tmp_path / "zili").tensors)
    known = weights_fingerprint(open_model(folder))
    assert weights_fingerprint(open_model(tmp_path / "zili")) == known
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    check_parts(open_model(folder).tensors)
    assert weights_fingerprint(open_model(folder)) == known
    assert weights_fingerprint(open_model(publish("llama"))) != known


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_in_pieces(tmp_path, shards):
    decoder = learner(MIXTURE)
    write_checkpoint(tmp_path / "step-00000003", decoder, shards)
    tensors = open_model(tmp_path).tensors
    check_parts(tensors)
    held = dict(decoder.named_tensors())
    assert tensors.describe().keys() == held.keys()
    assert all(torch.equal(tensors.read(name), held[name]) for name in held)
    ids = torch.arange(24)[None]
    assert torch.equal(zili.load(tmp_path)(ids), decoder.eval()(ids))
    assert export_model(tmp_path, tmp_path / "out").layout == "deepseek"
    assert torch.equal(zili.load(tmp_path / "out")(ids), decoder(ids))


class Reads:
    """Counts the elements that leave safetensors files."""

    def __init__(self, monkeypatch):
        self.elements = []
        self.monkeypatch = monkeypatch
        for module in ("zili.release.tensors", "zili.release.checkpoint"):
            monkeypatch.setattr(f"{module}.open_safetensors", self.open)

    def open(self, path):
        return self.Opened(safe_open(path, framework="pt"), self.elements)

    class Opened:
        def __init__(self, file, elements):
            self.file, self.elements = file, elements

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            self.elements.append(self.file.get_tensor(name).numel())
            return self.file.get_tensor(name)

        def get_slice(self, name):
            return Reads.Slice(self.file.get_slice(name), self.elements)

    class Slice:
        def __init__(self, piece, elements):
            self.piece, self.elements = piece, elements
            self.get_shape, self.get_dtype = piece.get_shape, piece.get_dtype

        def __getitem__(self, index):
            part = self.piece[index]
            self.elements.append(part.numel())
            return part


def test_no_more_is_read_than_is_asked_for(publish, tmp_path, monkeypatch):
    reads = Reads(monkeypatch)
    tensors = open_model(publish("deepseek")).tensors
    for name, index, elements in (
        ("norm.weight", (slice(3, 5),), [2]),
        ("embedding.weight", (slice(8, 10), slice(0, 7)), [14]),
        ("layers.1.feed_forward.experts.up", (slice(1, 3), slice(0, 24), slice(0, 32)), [24 * 32] * 2),
        ("layers.1.feed_forward.experts.up", (slice(3, 4), slice(5, 7), slice(0, 32)), [2 * 32]),
        # Its rows are in another order, so all are read.
        ("layers.1.attention.query_up.weight", (slice(0, 2), slice(0, 20)), [48 * 20]),
    ):
        reads.elements.clear()
        tensors.read(name, index)
        assert reads.elements == elements, name
    write_checkpoint(tmp_path / "step-00000003", learner(MIXTURE))
    tensors = open_model(tmp_path).tensors
    reads.elements.clear()
    tensors.read("layers.1.feed_forward.experts.up", (slice(2, 4), slice(0, 16), slice(0, 8)))
    assert reads.elements == [16 * 8] * 2  # the first shard has experts 0 to 2


def test_exporting_a_checkpoint_holds_one_expert_at_a_time(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "step-00000003", learner(MIXTURE))
    reads = Reads(monkeypatch)
    export_model(tmp_path, tmp_path / "out")
    expert = 16 * 32
    experts = 3 * 8 * 3  # two layers and that of multi-token prediction, gate, up and down
    assert reads.elements.count(expert) >= experts
    assert max(reads.elements) <= max(64 * 32, 48 * 32, 32 * 64)
    sizes = {name: tensor.numel() for name, tensor in learner(MIXTURE).named_tensors()}
    used = sum(size for name, size in sizes.items() if not name.startswith("next_tokens."))
    # Each once to be written, and what is not for training alone once more on either side of the comparison.
    assert sum(reads.elements) == sum(sizes.values()) + 2 * used


def test_a_checkpoint_that_lacks_a_piece(tmp_path):
    folder = tmp_path / "step-00000003"
    write_checkpoint(folder, learner(MIXTURE))
    shard = folder / "shard-00002-model.safetensors"
    with safe_open(shard, framework="pt") as file:
        metadata, kept = file.metadata(), load_file(shard)
    del kept["model.head.weight"]
    save_file(kept, shard, metadata)
    with pytest.raises(CheckpointError, match=r"shard-00002-model.safetensors is damaged: sha256"):
        open_model(folder)
    # As if it had been written so.
    (folder / "SHA256SUMS").unlink()
    files = sorted(folder.iterdir())
    (folder / "SHA256SUMS").write_text(
        "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    )
    with pytest.raises(CheckpointError, match=r"1344 of 2048 elements of head.weight are there; a shard is missing"):
        open_model(tmp_path).tensors.read("head.weight")


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; give a run folder"):
        open_model(tmp_path)


def build(tables, size):
    from zili import chips
    from zili.chips.device import Device
    from zili.parallel.apply import build_parts
    from zili.parallel.layout import lay_out
    from zili.parallel.world import World

    config = build_config(
        {
            "name": "parts",
            "model": MIXTURE.model_dump(exclude_none=True),
            "data": {"sources": [{"store": "none"}], "tokenizer": "none"},
            "training": {"steps": 1, "sequence_length": 32, "global_batch": 8, "micro_batch": 1},
            "chip": {"precision": "fp32", "compile": False},
            "parallel": tables,
        },
        origin="test",
    )
    device = Device(chips.activate(chips.find_backend("cpu")))
    make = partial(learner, config.model, None)
    return build_parts(config, World(lay_out(config, size), device), torch.float32, make)


LAYOUTS = (
    {"shards": 8},
    {"shards": 4, "tensor": 2},
    {"shards": 2, "tensor": 4, "expert": 4},
    {"shards": 8, "expert": 4},
    {"shards": 4, "expert": 4, "pipeline": 2},
)


def what_differs(rank, folders):
    """As process `rank` of 8, in each layout: what `fill_from` filled otherwise than `init_weights`, which cuts the
    same values by another way."""
    torch.distributed.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    different = []
    for parallel, folder in product(LAYOUTS, folders):
        parts = build(parallel, 8)
        named = [named for part in parts for named in part.named_tensors()]
        local = [(name, t.to_local() if isinstance(t, DTensor) else t) for name, t in named]
        expected = [tensor.detach().clone() for _, tensor in local]
        with torch.no_grad():
            for _, tensor in local:
                tensor.fill_(torch.nan)
        fill_from(parts, open_model(folder))
        same = [torch.equal(tensor, value) for (_, tensor), value in zip(local, expected, strict=True)]
        different += [(parallel, folder.name, name) for (name, _), equal in zip(local, same, strict=True) if not equal]
    return different


def test_each_process_reads_its_own_part(tmp_path):
    write_checkpoint(tmp_path / "step-00000003", learner(MIXTURE))
    export_model(tmp_path, tmp_path / "out")
    # A process for each rank: torch keeps meshes, and with them the rank that they were made for.
    with forks.context().Pool(2, maxtasksperchild=1) as pool:
        work = partial(what_differs, folders=[tmp_path, tmp_path / "out"])
        assert pool.map(work, (0, 5, 6, 7), chunksize=1) == [[]] * 4


def test_another_model_is_refused(tmp_path):
    write_checkpoint(tmp_path / "step-00000003", learner(MIXTURE.model_copy(update={"mtp_layers": 0})))
    with pytest.raises(CheckpointError, match=r"\d+ missing of \d+ tensors .*next_tokens"):
        fill_from([learner(MIXTURE)], open_model(tmp_path))
    with pytest.raises(CheckpointError, match=r"tensors of another shape .*head.weight is \(64, 32\), not \(72, 32\)"):
        fill_from([learner(MIXTURE.model_copy(update={"vocab_size": 72, "mtp_layers": 0}))], open_model(tmp_path))
