"""How good a model is: bits per byte, the compressors it is measured against, and the report of a run."""
