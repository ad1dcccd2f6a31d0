"""Zili trains, checks, releases and serves TeleChat-class language models on whatever chips a team can get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zili.release import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Lazy: `import zili` must not import torch, whose plugins read the environment at import time.
    if name == "load":
        from zili.release import load

        return load
    raise AttributeError(f"module 'zili' has no attribute {name!r}")
