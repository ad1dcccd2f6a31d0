"""`zili chips new`: names that cannot be, folders that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from zili.chips.skeleton import write_skeleton
from zili.errors import ChipError


def test_a_skeleton_is_python_and_toml(tmp_path: Path) -> None:
    import ast
    import tomllib

    files = write_skeleton("acme", tmp_path / "new", "xyz", "xyzccl", "torch_xyz")
    assert {path.name for path in files} == {"pyproject.toml", "zili_acme.py", "test_conformance.py", "README.md"}
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "{" not in text.replace("{\n", "").replace("capabilities={", "") or path.suffix == ".py"
        if path.suffix == ".py":
            ast.parse(text)
        if path.suffix == ".toml":
            assert tomllib.loads(text)["project"]["entry-points"]["zili.chips"] == {"acme": "zili_acme:BACKEND"}


@pytest.mark.parametrize(
    ("name", "device_type", "message"),
    [
        ("ascend", "xyz", "ascend .npu. has 'ascend' already"),
        ("acme", "npu", "has 'npu' already"),
        ("Acme Chip", "xyz", "small letters"),
        ("../acme", "xyz", "small letters"),
    ],
)
def test_a_name_that_cannot_be(name: str, device_type: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ChipError, match=message):
        write_skeleton(name, tmp_path / "new", device_type, "ccl", "torch_xyz")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ChipError, match="is there already"):
        write_skeleton("acme", tmp_path, "xyz", "ccl", "torch_xyz")
