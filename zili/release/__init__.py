"""Published checkpoint layouts, in and out."""

from zili.release.exporting import export_model
from zili.release.importing import import_model
from zili.release.opening import identity, load, load_into, open_model

__all__ = ["export_model", "identity", "import_model", "load", "load_into", "open_model"]
