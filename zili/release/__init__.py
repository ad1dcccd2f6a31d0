"""Published checkpoint layouts, in and out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zili.release.exporting import export_model
    from zili.release.importing import import_model
    from zili.release.opening import fill_from, identity, load, open_model, weights_fingerprint

__all__ = ["export_model", "fill_from", "identity", "import_model", "load", "open_model", "weights_fingerprint"]
_PLACES = {"export_model": "exporting", "import_model": "importing"}


def __getattr__(name: str) -> Any:
    # Lazy: what only looks at a folder, as whoever hands it to vLLM, needs no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'opening')}"), name)
