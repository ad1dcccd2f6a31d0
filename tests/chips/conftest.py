"""Packages made for one test: a plugin on sys.path, an entry point, a package that fails to import."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zili.chips import find_backend

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
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


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nobody has set a variable that a backend reads."""
    for name in ("ascend", "cambricon", "nvidia", "cpu"):
        backend = find_backend(name)
        for variable in backend.environment:
            for key in (variable.name, *variable.older_names):
                monkeypatch.delenv(key, raising=False)
        monkeypatch.delenv(backend.visible_devices or "", raising=False)
    # setenv first, so that what the code under test sets is undone at the end.
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD")
    return monkeypatch
