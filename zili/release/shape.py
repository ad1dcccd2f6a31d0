"""The shape of a model in any folder, its weights left alone.

`python -m zili.release.shape FOLDER` prints it, for those who must not import torch yet.
"""

from __future__ import annotations

import sys
from pathlib import Path

from zili.config import ModelConfig
from zili.config.model_folder import shape_in
from zili.errors import ZiliError
from zili.release.gguf.file import find_gguf
from zili.release.opening import is_published, open_gguf_model, open_published


def any_shape_in(folder: Path) -> ModelConfig | None:
    """The shape of a model in any folder that `load` takes; None: there is none.

    Raises:
        CheckpointError: a published model that is broken, or of no layout that is known.
    """
    own = shape_in(folder)
    if own is not None:
        return own
    if is_published(folder):
        return open_published(folder).config
    file = find_gguf(folder)
    return open_gguf_model(file).config if file else None


if __name__ == "__main__":
    try:
        shape = any_shape_in(Path(sys.argv[1]))
        print("null" if shape is None else shape.model_dump_json())
    except ZiliError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
