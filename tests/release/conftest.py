"""Tiny published-looking folders, each in its own layout, with random weights."""

import json

import pytest
import torch
from published_folders import PUBLISHED, random_tensors
from safetensors.torch import save_file


@pytest.fixture
def publish(tmp_path):
    """Write a synthetic folder: `publish("llama", dtype=..., changes={...config keys}, tensors=edit)`."""

    def write(layout, dtype=torch.bfloat16, changes=None, edit=None):
        config, shapes = PUBLISHED[layout]
        folder = tmp_path / f"published-{layout}"
        folder.mkdir()
        tensors = random_tensors(shapes, dtype)
        if edit:
            edit(tensors)
        (folder / "config.json").write_text(json.dumps({**config, **(changes or {})}))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write
