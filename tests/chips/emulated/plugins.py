"""Folders that stand for an installed vendor plugin: a module, its package metadata, and an entry point of ours.

`python tests/chips/emulated/plugins.py FOLDER` installs one for a chip that Zili has no record of, to try
docs/extending/chip.md with: it prints what a shell must export.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from emulated import LIBRARY, build

Environment = Callable[..., dict[str, str]]
"""The fixture `with_plugins`: vendors, and further variables by name, to the variables of a process."""
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Vendor:
    """A vendor to be emulated."""

    backend: str
    """What `chip.name` takes."""
    plugin: str
    device_type: str
    collectives: str
    chip: str
    """Model, as its driver reports it."""
    operations: str = ""
    """Module with operations of the vendor's own; empty: none."""
    record: str = ""
    """Source of a module with the record `BACKEND`; empty: Zili has one."""

    def __str__(self) -> str:
        return f"{self.device_type}/{self.collectives}"


ASCEND = Vendor("ascend", "torch_npu", "npu", "hccl", "Ascend910B2", operations="npu_operations")
CAMBRICON = Vendor("cambricon", "torch_mlu", "mlu", "cncl", "MLU590")
# Not "xccl": torch 2.13 takes that name for Intel's library, which it must have been built with.
UNHEARD_OF = Vendor(
    "unheard",
    "torch_xyz",
    "xyz",
    "xyzccl",
    "XYZ-1",
    record="""
from zili.chips import Backend, Capability

BACKEND = Backend(
    name="unheard",
    device_type="xyz",
    collectives="xyzccl",
    plugin="torch_xyz",
    plugin_pairs=True,
    capabilities=dict.fromkeys(
        ("fsdp2", "fused_adamw", "bf16_reduce", "grouped_matmul", "inf_nan", "deterministic"),
        Capability(True, "emulated"),
    ),
)
""",
)
VENDORS = (ASCEND, CAMBRICON, UNHEARD_OF)
ACME = Vendor("acme", "torch_acme", "xyz", "xyzccl", "ACME-1")
"""That of docs/extending/chip.md, whose reader writes the record."""


def install(vendor: Vendor, folder: Path) -> Path:
    """Put the plugin of `vendor` into `folder`, for PYTHONPATH; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    call = f'register("{vendor.device_type}", "{vendor.collectives}", "{vendor.chip}")'
    operations = f"import {vendor.operations}\n" if vendor.operations else ""
    refusals = f"refuse(find_backend({vendor.backend!r}).refusals)\n"
    imports = "from emulated import refuse, register\nfrom zili.chips import find_backend\n"
    module = f"{imports}\n{call}\n{refusals}{operations}\n\ndef _autoload():\n    pass\n"
    (folder / f"{vendor.plugin}.py").write_text(module, encoding="utf-8")
    points = f"[torch.backends]\n{vendor.plugin} = {vendor.plugin}:_autoload\n"
    if vendor.record:
        (folder / f"zili_{vendor.backend}.py").write_text(vendor.record, encoding="utf-8")
        points += f"[zili.chips]\n{vendor.backend} = zili_{vendor.backend}:BACKEND\n"
    version = torch.__version__.split("+")[0]
    info = folder / f"{vendor.plugin}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {vendor.plugin}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(points)
    return folder


def environment(library: Path, *folders: Path) -> dict[str, str]:
    """Variables of a process that finds the plugins in `folders`."""
    path = [*map(str, (*folders, _HERE)), *filter(None, (os.environ.get("PYTHONPATH"),))]
    return {"PYTHONPATH": os.pathsep.join(path), LIBRARY: str(library), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    for key, value in environment(build(place), install(ACME, place)).items():
        print(f"export {key}={shlex.quote(value)}")
