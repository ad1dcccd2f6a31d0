"""What a layout costs a process: memory and bytes sent in one step, beside the closed forms.

    python benchmarks/parallel.py

Takes a step of the real trainer on processes of this machine, over Gloo. Memory is that of all live tensor storages,
looked at after every operation: `state` between steps, `peak` within one (its closed form is the estimate that setup
refuses runs by, meant to be an upper bound). Bytes are those of the tensors handed to
collectives, each counted for the least that a process must send: `(n - 1) / n` of the whole for a gather or a scattered
sum over n, twice that for a sum, and what goes to others for an exchange or a message. Figures are of the process that
has most, in MB (10^6). The closed forms are computed from the configuration alone; docs/parallel.md explains them.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import socket
import tempfile
import time
import weakref
from math import prod
from pathlib import Path
from typing import Any

from zili.config import RunConfig, build_config
from zili.models.arithmetic import parameter_shapes
from zili.parallel.layout import Layout, lay_out

DENSE = ("shards=1", "replicas=2", "shards=2", "shards=4", "tensor=2", "context=2", "pipeline=2")
COMBINED = ("shards=2 tensor=2", "replicas=2 shards=2", "shards=2 pipeline=2", "context=2 tensor=2")
EXPERTS = ("shards=2", "shards=2 expert=2", "shards=4 expert=2", "tensor=2 expert=2")
MODEL = {
    **{"vocab_size": 2048, "hidden_size": 256, "layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 32},
    **{"ffn_hidden_size": 768, "max_length": 512},
}
MIXTURE = {"experts": 8, "top_k": 2, "ffn_hidden_size": 256}
SECONDS = 300


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        print("| model | layout | state | closed form | peak | closed form | sent | closed form |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for mixture, texts in ((False, DENSE + COMBINED), (True, EXPERTS)):
            for text in texts:
                table = {name: int(size) for name, size in (part.split("=") for part in text.split())}
                world = prod(size for name, size in table.items() if name != "expert")
                config = recipe(Path(folder), table, mixture=mixture)
                layout = lay_out(config, world)
                found = [max(figures) for figures in zip(*measured(config, world), strict=True)]
                form = (state_bytes(config, layout), peak_bytes(config, layout), sent_bytes(config, layout))
                cells = [f"{value / 1e6:.2f}" for pair in zip(found, form, strict=True) for value in pair]
                print(f"| {'mixture' if mixture else 'dense'} | {layout} | {' | '.join(cells)} |", flush=True)


def make_data(folder: Path) -> None:
    """A tokenizer and a token store of made-up words."""
    from zili.data import Document, Tokenizer, build_store

    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghij", k=letters.randint(2, 8))) for _ in range(500)]
    texts = [" ".join(letters.choices(words, k=400)) for _ in range(100)]
    tokenizer = Tokenizer.train(texts, vocab_size=1000)
    tokenizer.save(folder / "tokenizer")
    build_store([Document(text, str(i)) for i, text in enumerate(texts)], tokenizer, folder / "train")


def recipe(folder: Path, parallel: dict[str, int], *, mixture: bool) -> RunConfig:
    """One step has one micro-batch a process, or as many as a pipeline needs."""
    table: dict[str, Any] = {
        "folder": str(folder / "run"),
        "model": {**MODEL, **({"mixture": MIXTURE} if mixture else {})},
        "data": {"sources": [{"store": str(folder / "train")}], "tokenizer": str(folder / "tokenizer")},
        "training": {"steps": 2, "sequence_length": 256, "global_batch": 8},
        "parallel": {"shards": 1, **parallel},
        "chip": {"name": "cpu", "precision": "fp32", "compile": False, "operations": {"linear": "reference"}},
    }
    own = 8 // (parallel.get("replicas", 1) * parallel.get("shards", 1))
    table["training"]["micro_batch"] = own // parallel.get("pipeline", 1)
    return build_config(table, origin="benchmark")


# The closed forms.


class Sizes:
    """Parameters of one process by how they are cut, gathered over the processes that share their storage."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.products = self.small = self.experts = self.ends = 0.0
        for name, shape in parameter_shapes(config.model).items():
            if ".experts." in name:
                self.experts += prod(shape) / layout.expert / layout.pipeline
            elif name in ("embedding.weight", "head.weight"):
                self.ends += prod(shape) / layout.tensor / min(layout.pipeline, 2)
            elif len(shape) == 2 and ".router." not in name:
                self.products += prod(shape) / layout.tensor / layout.pipeline
            else:
                self.small += prod(shape) / layout.pipeline
        self.dense = self.products + self.small + self.ends


def state_bytes(config: RunConfig, layout: Layout) -> float:
    """Weights and AdamW's two moments in fp32: 12 bytes a parameter, cut by everything that cuts it."""
    sizes = Sizes(config, layout)
    return 12 * (sizes.dense / layout.weight_shards + sizes.experts / layout.expert_shards)


def peak_bytes(config: RunConfig, layout: Layout) -> float:
    """The planner's, of the process that has most; without the copies of a save, since none is made here."""
    from zili.planning.exact.job import Job
    from zili.planning.exact.memory import CHECKPOINT, fullest

    parts = fullest(Job(config, layout, on_host=True))
    return sum(size for part, size in parts.items() if part != CHECKPOINT)


def sent_bytes(config: RunConfig, layout: Layout) -> float:
    """What the sections of docs/parallel.md add up to, for one step."""
    model, training = config.model, config.training
    sizes, micro = Sizes(config, layout), training.micro_batch
    assert isinstance(micro, int)
    own = training.global_batch // layout.data
    tokens = own * training.sequence_length // layout.context
    layers = model.layers / layout.pipeline
    gathers = 2 if layout.pipeline == 1 else 1  # forward and backward; a pipeline keeps what it has gathered
    weights = _part(layout.weight_shards) * ((gathers + 1) * (sizes.products + sizes.small) + 2 * sizes.ends)
    weights += 2 * _part(layout.replicas) * sizes.dense / layout.weight_shards
    experts = _part(layout.expert_shards) * (gathers + 1) * sizes.experts
    experts += 2 * _part(layout.replicas) * sizes.experts / layout.expert_shards
    matrices = 4 if model.mixture is None else 2  # a mixture works on each process's own tokens
    ends = 4 / min(layout.pipeline, 2) if layout.pipeline > 1 else 4
    between = _part(layout.tensor) * tokens * model.hidden_size * (2 * matrices * layers + ends)
    # The loss: the largest logit, then two sums a token. Norms and routers: their gradients, summed.
    loss = 2 * _part(layout.tensor) * (3 * tokens / layout.pipeline + sizes.small)
    key_values = 2 * model.kv_heads * model.head_dim / layout.tensor
    keys = 2 * layers * _part(layout.context) * tokens * layout.context * key_values
    # Forward to the next stage, backward to the one before; an end of the pipeline sends one of them.
    stages = (min(layout.pipeline, 3) - 1) * tokens * model.hidden_size / layout.tensor
    rows = 0.0
    if model.mixture is not None and layout.expert > 1:
        routed = tokens / layout.tensor * model.mixture.top_k
        rows = _part(layout.expert) * routed * model.hidden_size * 4 * layers
    return 4 * (weights + experts + between + loss + keys + stages + rows)


def _part(processes: int) -> float:
    return (processes - 1) / processes


# The measurement.


def measured(config: RunConfig, world: int) -> list[tuple[float, float, float]]:
    """State, peak and bytes sent of each process."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: Any = context.Queue()
    processes = [context.Process(target=_process, args=(r, world, port, config, results)) for r in range(world)]
    for process in processes:
        process.start()
    found, end = [], time.monotonic() + SECONDS
    try:
        while len(found) < world and time.monotonic() < end and all(p.exitcode in (0, None) for p in processes):
            try:
                found.append(results.get(timeout=1))
            except queue.Empty:
                continue
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    if len(found) < world:
        raise SystemExit(f"{world - len(found)} of {world} processes did not finish")
    return found


def _process(rank: int, world: int, port: int, config: RunConfig, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    from zili.runs.opening import open_run

    opened = open_run(config)
    from zili.parallel.world import leave
    from zili.training.trainer import Trainer

    watch = _watch_class()()
    with watch:
        trainer = Trainer(opened.setup.config, opened.loader, opened.setup.device, (), opened.setup.world)
        trainer.parallel.train()
        rows = opened.setup.world.rows(config.training.global_batch)
        trainer.train_step(opened.loader.batch(0, rows))  # makes the optimizer's state
        state = watch.live()
        watch.begin()
        trainer.train_step(opened.loader.batch(1, rows))
    results.put((state, watch.peak, watch.sent))
    leave()


def _watch_class() -> type:
    """The class is made here: torch may be imported only after the chip is activated."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        """Sees every operation: which storages are alive after it, and what collectives are given."""

        def __init__(self) -> None:
            super().__init__()
            self.storages: dict[int, Any] = {}
            self.peak = self.sent = 0.0

        def begin(self) -> None:
            self.peak = self.sent = 0.0

        def live(self) -> float:
            alive = {key: ref for key, ref in self.storages.items() if ref() is not None}
            self.storages = alive
            return float(sum(ref().nbytes() for ref in alive.values() if ref() is not None))

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves((args, kwargs, out)):
                own = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
                if isinstance(own, torch.Tensor) and own.layout == torch.strided and not own.is_meta:
                    storage = own.untyped_storage()
                    self.storages.setdefault(storage._cdata, weakref.ref(storage))
            self.peak = max(self.peak, self.live())
            self.sent += _sent(func, args, out)
            return out

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))

    def group_of(args: Any) -> int:
        for value in args:
            if isinstance(value, str) and value not in ("sum", "max", "avg"):
                return dist.distributed_c10d._resolve_process_group(value).size()
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
                return dist.ProcessGroup.unbox(value).size()
        raise ValueError(f"no group among {args}")

    def _sent(func: Any, args: Any, out: Any) -> float:
        space, _, name = func.name().split(".")[0].partition("::")
        if space not in ("c10d", "_c10d_functional"):
            return 0.0
        if name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single"):
            n = group_of(args)
            own = size(args[0])
            return _part(n) * {"all_gather_into_tensor": n * own, "all_reduce": 2 * own}.get(name, own)
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            return _part(group_of(args)) * max(size(args[0]), size(args[1]))
        if name == "allreduce_":
            return 2 * _part(group_of(args)) * size(args[0])
        return float(size(args[0])) if name == "send" else 0.0

    return Watch


if __name__ == "__main__":
    main()
