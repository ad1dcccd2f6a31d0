"""The schemas of torch_npu's operations that `zili.ops.ascend` calls.

`python schemas.py`, in an environment with the wheel and the stand-ins of stub_cann.py, writes schemas.json, which the
default tests check our calls against.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import zili.ops.ascend

TABLE = Path(__file__).with_name("schemas.json")


def called() -> list[str]:
    """Names of the operations that `zili.ops.ascend` calls."""
    source = Path(zili.ops.ascend.__file__).read_text(encoding="utf-8")
    return sorted(set(re.findall(r'_operation\("(\w+)"\)', source)))


def in_the_wheel() -> dict[str, str]:
    """Schema by name, from the wheel in this environment."""
    import torch
    import torch_npu  # noqa: F401 - registers them

    return {name: str(getattr(torch.ops.npu, name).default._schema) for name in called()}


if __name__ == "__main__":
    import importlib.metadata

    table = {"torch_npu": importlib.metadata.version("torch_npu"), "schemas": in_the_wheel()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
