"""Published checkpoint layouts, in and out."""

from zili.release.transfer import export_model, import_model, load, load_into, open_model

__all__ = ["export_model", "import_model", "load", "load_into", "open_model"]
