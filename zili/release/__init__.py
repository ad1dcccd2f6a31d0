"""Published checkpoint layouts, in and out."""

from zili.release.exporting import export_model
from zili.release.importing import import_model
from zili.release.opening import load, load_into, open_model

__all__ = ["export_model", "import_model", "load", "load_into", "open_model"]
