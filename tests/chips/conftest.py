"""Packages made for one test: a plugin on sys.path, an entry point, a package that fails to import."""

from __future__ import annotations

import pytest

from zili.chips import find_backend


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
