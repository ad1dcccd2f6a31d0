"""`zili align` on an emulated device: a sound one is within its bands, and planted errors are found where they are."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet, finalize

import pytest
import torch
from emulated import Fault
from forks import zili
from many import on_processes
from pairs import polite_pairs
from plugins import ASCEND, CAMBRICON, Environment
from tiny_models import Kind, Runs, slow
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zili.config import RunConfig, dump_recipe
from zili.diagnosis.shadow import Shadow

PLACES: list[Any] = [
    ("aten::index_select", 0, "forward", "embedding", "dense", "embedding"),
    ("aten::rsqrt", 0, "forward", "layers.0.attention_norm", "dense"),
    ("aten::addmm", 1, "forward", "layers.0.attention.key", "dense"),
    ("aten::mm", 0, "forward", "the model", "dense"),
    ("aten::addmm", 5, "forward", "layers.0.feed_forward.up", "dense"),
    ("aten::silu", 2, "forward", "layers.2.feed_forward", "dense"),
    ("aten::_softmax", 1, "forward", "layers.1.attention.core", "dense", "_safe_softmax"),
    ("aten::silu_backward", 0, "backward", "layers.3.feed_forward", "dense"),
    ("aten::_softmax_backward_data", 3, "backward", "layers.0.attention.core", "dense"),
    ("aten::embedding_dense_backward", 0, "backward", "embedding", "dense"),
    ("aten::_fused_adamw_", 0, "optimizer", "the optimizer", "dense"),
    ("aten::sigmoid", 1, "forward", "layers.2.feed_forward.router", "mixture"),
    ("aten::cat", 0, "forward", "the model", "mixture"),
    ("aten::index", 0, "forward", "layers.1.feed_forward", "mixture"),
]
"""Kernel, which of its calls; way, module, and operation where it is another that the kernel is for."""


def alignments(config: RunConfig, planted: list[list[Fault]], steps: int = 1) -> list[Any]:
    """What `zili align` finds with each of `planted`, there while the chip trains: losses, and where it went wrong."""
    import emulated

    from zili.diagnosis import align

    real: Callable[..., Any] = align._losses
    found = []
    for faults in planted:

        def with_faults(trainer: Any, steps: int, shadow: Any = None, faults: list[Fault] = faults) -> Any:
            emulated.plant(*(faults if shadow is not None else []))
            return real(trainer, steps, shadow)

        align._losses = with_faults
        result = align.align(config, steps)
        found.append((result.losses, [(o.way, o.module, o.operation) for o in result.offences], str(result.first)))
    return found


class HostBytes(TorchDispatchMode):
    """Bytes on the host of what operations make, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        out = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size


def memory(config: RunConfig) -> tuple[int, int, int]:
    """Largest bytes of a plain step on the device, of one that `zili align` watches, and on the host meanwhile."""
    import emulated

    from zili.diagnosis import align
    from zili.runs.opening import open_trainer

    peaks = []
    host = HostBytes()
    for watch in (nullcontext(), host):
        trainer = open_trainer(config)
        shadow = Shadow(trainer.model, trainer.device.type) if watch is host else None
        align._losses(trainer, 1)  # the optimizer's state is made by the first step
        emulated.reset()
        with watch:
            align._losses(trainer, 1, shadow)
        peaks.append(emulated.counts().peak)
        del trainer
    return *peaks, host.peak


@pytest.mark.slow
def test_its_memory_does_not_grow_with_the_depth(runs: Runs, with_plugins: Environment) -> None:
    found = [
        on_processes(1, memory, recipe(runs, "dense", f"model.layers={layers}"), environment=with_plugins(CAMBRICON))[0]
        for layers in (2, 6)
    ]
    (shallow, watched, host), (deep, watched_deep, host_of_deep) = found
    assert deep > 1.5 * shallow
    a_layer = (deep - shallow) / 4
    # Attention's gradients are taken once more by themselves, and compared, for which a shallow model's step leaves no
    # room: 1.06 layers were seen.
    assert watched <= shallow + 1.1 * a_layer and watched_deep <= 1.02 * deep
    assert 0 < host_of_deep <= 1.02 * host


def recipe(runs: Runs, kind: Kind, *more: str) -> RunConfig:
    plain = [f"chip.operations.{name}=reference" for name in ("linear", "attention", "grouped_matmul")]
    return runs.recipe(kind, "chip.name=cambricon", "training.global_batch=2", *plain, *more)


@pytest.mark.parametrize("kind", ["dense", slow("mixture")])
def test_a_sound_device_is_within_every_band(kind: Kind, runs: Runs, with_plugins: Environment) -> None:
    ((found,),) = on_processes(1, alignments, recipe(runs, kind), [[]], 2, environment=with_plugins(CAMBRICON))
    losses, offences, first = found
    assert offences == [], first
    assert all(chip == pytest.approx(cpu, rel=1e-6) for chip, cpu in losses)


def test_bf16_and_the_vendors_operations_are_within_their_bands(runs: Runs, with_plugins: Environment) -> None:
    from zili.ops import ascend

    fused = [f"chip.operations.{version.operation}={version.name}" for version in ascend.VERSIONS]
    config = recipe(runs, "mixture", "chip.name=ascend", "chip.precision=bf16", *fused)
    ((found,),) = on_processes(1, alignments, config, [[]], environment=with_plugins(ASCEND))
    assert found[1] == [], found[2]


@pytest.mark.slow
def test_preferences_are_aligned_beside_a_reference(
    tiny_data: Path, runs: Runs, with_plugins: Environment, tmp_path: Path
) -> None:
    pairs = polite_pairs(tiny_data / "tokenizer", tmp_path / "pairs")
    config = recipe(
        runs, "dense", pairs, "training.sequence_length=128", "training.start_from=model", "preference.beta=1"
    )
    ((found,),) = on_processes(1, alignments, config, [[]], 2, environment=with_plugins(CAMBRICON))
    losses, offences, first = found
    assert offences == [], first
    assert losses[0] == pytest.approx([0.693147] * 2, rel=1e-4)
    # Differences of sums of log-probabilities, which are some hundred times as large.
    assert losses[1] == pytest.approx([losses[1][0]] * 2, rel=1e-5)


ALWAYS = ("aten::index_select", "aten::addmm", "aten::silu_backward", "aten::_fused_adamw_")
"""Kernels tried by default: of the embedding, of a product, backward, and of the optimizer."""


def place(given: tuple[Any, ...]) -> Any:
    """A case of the test below."""
    values = (*given, "")[:6]
    return values if values[0] in ALWAYS else slow(*values)


@pytest.fixture(scope="module")
def found(runs: Runs, with_plugins: Environment, request: pytest.FixtureRequest) -> dict[tuple[str, int, Kind], Any]:
    """Results of the places asked for, those of one model in one process."""
    results = {}
    asked = [item for item in request.session.items if item.path == request.path and "found" in item.fixturenames]
    for kind in sorted({item.callspec.params["kind"] for item in asked}):
        of_kind = [item.callspec.params for item in asked if item.callspec.params["kind"] == kind]
        places = [(parameters["kernel"], parameters["call"]) for parameters in of_kind]
        planted = [[Fault(kernel, "scale", 0.01, call, call + 1)] for kernel, call in places]
        (own,) = on_processes(1, alignments, recipe(runs, kind), planted, environment=with_plugins(CAMBRICON))
        results |= {(*place, kind): result for place, result in zip(places, own, strict=True)}
    return results


@pytest.mark.parametrize(("kernel", "call", "way", "module", "kind", "operation"), [*map(place, PLACES)])
def test_a_planted_error_is_found_at_its_operation_and_nowhere_else(
    kernel: str, call: int, way: str, module: str, kind: Kind, operation: str, found: dict[Any, Any]
) -> None:
    _, offences, first = found[kernel, call, kind]
    places = [(way, module, operation.split(".")[1]) for way, module, operation in offences]
    assert places == [(way, module, operation or kernel[6:])], first


HALF_A_PER_CENT: list[tuple[str, int, str]] = [
    ("aten::addmm", 1, "forward"),
    ("aten::silu_backward", 0, "backward"),
    ("aten::embedding_dense_backward", 0, "backward"),
]
"""Kernel, which of its calls, and way."""


def test_half_a_per_cent_is_found_in_bf16(runs: Runs, with_plugins: Environment) -> None:
    planted = [[Fault(kernel, "scale", 0.005, call, call + 1)] for kernel, call, _ in HALF_A_PER_CENT]
    config = recipe(runs, "dense", "chip.precision=bf16", "model.layers=2")
    (found,) = on_processes(1, alignments, config, [[], *planted], environment=with_plugins(CAMBRICON))
    assert found[0][1] == [], found[0][2]
    for (kernel, _, way), (_, offences, first) in zip(HALF_A_PER_CENT, found[1:], strict=True):
        assert [(way, operation.split(".")[1]) for way, _, operation in offences] == [(way, kernel[6:])], first


def test_the_command(runs: Runs, with_plugins: Environment, tmp_path: Path) -> None:
    file, page = tmp_path / "recipe.toml", tmp_path / "align.html"
    laid_out = recipe(runs, "dense", "parallel.tensor=2", "training.recompute=full")  # neither matters to align
    file.write_text(dump_recipe(laid_out), encoding="utf-8")
    fault = '[{"operation": "aten::silu", "kind": "scale", "amount": 0.01}]'
    environment = with_plugins(CAMBRICON, EMULATED_FAULTS=fault)

    def align(*words: str) -> subprocess.CompletedProcess[str]:
        return zili("align", file, "--steps", "1", *words, environment=environment)

    wrong = align("--page", str(page))
    assert wrong.returncode == 10, wrong.stderr
    assert "first step 1, forward of layers.0.feed_forward: aten.silu.default" in wrong.stdout
    assert "aten.silu.default" in page.read_text(encoding="utf-8")
    itself = align("--set", "chip.name=cpu")
    assert itself.returncode == 3 and "compared with itself" in itself.stderr
    other = align("--against", "nvidia")
    assert other.returncode == 3 and "only cpu" in other.stderr
    assert not (runs.recipe("dense").folder.parent / "checkpoints").exists()
