"""A tiny text, tokenizer, model shape and recipe that training's and the command line's tests share."""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before anything imports torch: tiny products gain nothing from threads, and beside other work those of OpenMP wait for
# each other by spinning (two tests took 99.6 s with two threads beside other work, and 5.0 s with one).
os.environ.setdefault("OMP_NUM_THREADS", "1")

from zili.config import RunConfig, build_config
from zili.data import Document, Tokenizer, build_store

TEXT = r"self reliance 自立 kemandirian trains def return lambda class 中国 naïve 3.14 it's , . ( )"
WORDS = [*TEXT.split(), "\n"]
Recipe = Callable[..., RunConfig]
# An example that takes long says something of the machine, which others may be using.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: tests wait for servers, clocks and each other's processes."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


def made_up_texts(count: int, seed: int) -> list[str]:
    """`count` texts of 5 to 60 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(count)]


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests measure and compile is not the user's, and the processes they start share it."""
    os.environ["ZILI_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts a job in the background with SIGINT ignored, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="module")
def every_file_begins_with_the_reference_operations() -> None:
    _choose({})


@pytest.fixture(autouse=True)
def operations_are_the_tests_own() -> Iterator[None]:
    """What one test chooses in this process is no other's: any may come next."""
    before = _chosen()
    yield
    _choose(before)


def _chosen() -> dict[str, str]:
    ops = sys.modules.get("zili.ops")  # without it, nothing was chosen; it would import torch
    return ops.chosen() if ops else {}


def _choose(versions: dict[str, str]) -> None:
    """Those not in `versions` become the reference."""
    if (now := _chosen()) != {**dict.fromkeys(now, "reference"), **versions}:
        sys.modules["zili.ops"].choose("cpu", "fp32", versions, now.keys() - versions)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer/` (300 tokens) and the stores `train`, `other` and `held_out`."""
    folder = tmp_path_factory.mktemp("tiny-data")
    tokenizer = Tokenizer.train(made_up_texts(100, seed=0), vocab_size=300)
    tokenizer.save(folder / "tokenizer")
    for seed, (name, count) in enumerate({"train": 150, "other": 150, "held_out": 6}.items()):
        documents = [Document(text, f"{name}:{i}") for i, text in enumerate(made_up_texts(count, seed))]
        build_store(documents, tokenizer, folder / name, engine="tokenizers")
    return folder


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Recipe:
    """`recipe("training.steps=3", ...)`: a tiny run into `tmp_path / "run"`, resolved but for the overrides."""
    table: dict[str, Any] = {
        "folder": str(tmp_path / "run"),
        "model": {
            "vocab_size": 304,
            "hidden_size": 32,
            "layers": 2,
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 16,
            "ffn_hidden_size": 48,
            "max_length": 64,
        },
        "data": {"sources": [{"store": str(tiny_data / "train")}], "tokenizer": str(tiny_data / "tokenizer")},
        "training": {"steps": 6, "sequence_length": 32, "global_batch": 4, "micro_batch": 2},
        "optimizer": {"learning_rate": 3e-3},
        "chip": {"name": "cpu", "precision": "fp32", "compile": False},
        "checkpoint": {"every": 2},
    }
    return lambda *overrides: build_config(table, overrides, origin="a test")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`install("acme", code, entry_points="[group]\\nname = module:attribute")` puts a distribution on sys.path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def add(module: str, code: str, *, entry_points: str = "", version: str = "1.0") -> Path:
        (site / f"{module}.py").write_text(code, encoding="utf-8")
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points)
        importlib.invalidate_caches()
        # Recorded so that the module imported during the test is dropped at its end.
        monkeypatch.delitem(sys.modules, module, raising=False)
        return site

    return add
