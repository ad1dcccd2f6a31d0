"""Peak memory of a process that loads a published folder into a sharded model, and of one that exports a sharded run.

    python benchmarks/load_sharded.py

A model of 135 million parameters (541 MB in fp32) is written as a Hugging Face folder of safetensors. Then processes
load it, each its own part; one of them alone loads it whole, for comparison. At the end a run of four shards is
exported by one process. Printed is what a process had at its peak above what it had before (VmHWM above VmRSS, Linux),
its own part of the weights included.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

MODEL = {
    **{"vocab_size": 16384, "hidden_size": 1024, "layers": 8, "heads": 16, "kv_heads": 16, "head_dim": 64},
    **{"ffn_hidden_size": 2816, "max_length": 512},
}
LAYOUTS: tuple[dict[str, int], ...] = (
    {"shards": 1},
    {"shards": 2},
    {"shards": 4},
    {"shards": 2, "tensor": 2},
    {"pipeline": 2},
)
TRAINING = {"steps": 1, "sequence_length": 256, "global_batch": 4, "micro_batch": 1}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _apart(1, _write, folder)[0]
        print(f"weights: {size / 1e6:.0f} MB in fp32")
        print("| work | layout | processes | own part, MB | peak above start, MB |")
        print("| --- | --- | --- | --- | --- |")
        for table in LAYOUTS:
            world = 1
            for count in table.values():
                world *= count
            found = _apart(world, _load, folder, table)
            part, peak = (max(values) for values in zip(*found, strict=True))
            print(f"| load | {table} | {world} | {part / 1e6:.0f} | {peak / 1e6:.0f} |", flush=True)
        _apart(4, _save, folder)
        peak = _apart(1, _export, folder)[0]
        print(f"| export | of four shards | 1 | | {peak / 1e6:.0f} |")


def _config(folder: Path, table: dict[str, int]) -> Any:
    from zili.config import build_config

    chip = {"name": "cpu", "precision": "fp32", "compile": False}
    data = {"sources": [{"store": "none"}], "tokenizer": "none"}
    tables = {"model": MODEL, "data": data, "training": TRAINING, "parallel": {"shards": 1, **table}, "chip": chip}
    return build_config({"folder": str(folder / "run"), **tables}, origin="benchmark")


def _write(folder: Path) -> float:
    """The folder to load, in shards of 100 MB."""
    from zili.config import ModelConfig
    from zili.models.decoder import Decoder
    from zili.release.folder import write_json
    from zili.release.layouts.layout import Variant
    from zili.release.layouts.llama import Llama
    from zili.release.layouts.mapping import PublishedTensors
    from zili.release.tensors import HeldTensors, write_tensors

    model, layout = Decoder(ModelConfig.model_validate(MODEL)), Llama()
    target = folder / "published"
    target.mkdir()
    write_json(target / "config.json", layout.write_config(model.config))
    tensors = PublishedTensors(HeldTensors(model.state_dict()), layout.rules(model.config, Variant(layout.prefix)))
    write_tensors(tensors, target, 100_000_000)
    return float(sum(p.nbytes for p in model.parameters()))


def _parts(folder: Path, table: dict[str, int]) -> Any:
    from zili.training.setup import set_up

    setup = set_up(_config(folder, table))
    import torch

    from zili.objectives import objective_of
    from zili.parallel.model import ParallelModel

    return setup, ParallelModel(setup.config, setup.world, torch.float32, objective_of(setup.config))


def _load(folder: Path, table: dict[str, int]) -> tuple[float, float]:
    from zili.parallel.model import plain

    before = _memory("VmRSS")
    _, model = _parts(folder, table)
    own = sum(plain(p).nbytes for p in model.parameters())
    from zili.release import load_into

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: setting up has its own
    load_into(model.parts, folder / "published")
    return float(own), _memory("VmHWM") - before


def _save(folder: Path) -> float:
    from zili.training import checkpoints
    from zili.training.saving import Saver

    setup, model = _parts(folder, {"shards": 4})
    state = checkpoints.RunState(1, 1, setup.config.model_dump(mode="json"), "none")
    saver = Saver(folder / "run" / "checkpoints", setup.world, keep=2, asynchronous=False)
    saver.save(state, checkpoints.model_tensors(model.named_tensors()))
    saver.wait()
    return 0.0


def _export(folder: Path) -> float:
    from zili.release import export_model

    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    export_model(folder / "run", folder / "exported", max_shard_bytes=50_000_000)
    return _memory("VmHWM") - before


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _apart(world: int, work: Any, *arguments: Any) -> list[Any]:
    """`work` on processes of their own; results by whichever is done first."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: Any = context.Queue()
    processes = [context.Process(target=_one, args=(r, world, port, results, work, arguments)) for r in range(world)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(30)
    return found


def _one(rank: int, world: int, port: int, results: Any, work: Any, arguments: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    try:
        results.put(work(*arguments))
    except BaseException:
        results.put(None)
        raise
    if world > 1:
        from zili.parallel.world import leave

        leave()


if __name__ == "__main__":
    main()
