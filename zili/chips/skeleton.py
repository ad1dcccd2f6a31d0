"""The files of a plugin for a new chip: `zili chips new`."""

from __future__ import annotations

import re
from pathlib import Path

from zili.chips.backend import CAPABILITIES
from zili.chips.registry import registry
from zili.errors import ChipError

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "zili-{name}"
version = "0.1"
dependencies = ["zili"]

[project.entry-points."zili.chips"]
{name} = "zili_{name}:BACKEND"

[tool.setuptools]
py-modules = ["zili_{name}"]
"""

_RECORD = '''\
"""{name} for Zili: one record. It must not import torch; the plugin it names is imported later."""

from zili.chips import Backend, Capability, Variable  # noqa: F401 - Variable is for `environment`

BACKEND = Backend(
    name="{name}",  # chip.name = "{name}"
    device_type="{device_type}",  # torch.device("{device_type}")
    collectives="{collectives}",  # torch.distributed backend
    plugin="{plugin}",  # imported after torch; registers the device
    plugin_pairs=False,  # True: its major.minor version must be torch's
    install="say here how a user gets {plugin} and its driver",
    device_nodes=None,  # "/dev/{name}[0-9]*": the files the driver makes, one a device
    visible_devices=None,  # "{upper}_VISIBLE_DEVICES": the variable that limits the devices a process sees
    environment=(
        # Variable("{upper}_ALLOCATOR", "pooled", "why it is set; a user's own value wins"),
    ),
    operations=None,  # "zili_{name}_operations": a module with VERSIONS of zili.ops.versions.Version
    capabilities={{
        # What `zili doctor --chip {name}` shows to work, set to True, with what it rests on.
{capabilities}
    }},
)
'''

_TEST = '''\
"""The checks a backend must pass; those of the device need the device."""

import importlib.util

import pytest
from zili.diagnosis import conformance
from zili.diagnosis.findings import Severity

here = pytest.mark.skipif(importlib.util.find_spec("{plugin}") is None, reason="{plugin} is not installed")


def broken(findings):
    return [str(finding) for finding in findings if finding.severity is Severity.BROKEN]


def test_the_record():
    assert broken(conformance.check_record("{name}")) == []


@here
def test_the_device_computes_and_trains_as_the_cpu_does():
    assert broken(conformance.check_device("{name}")) == []


@here
def test_two_processes_reach_one_another():
    assert broken(conformance.check_processes("{name}")) == []
'''

_README = """\
# zili-{name}

    pip install --editable .   # beside zili, torch and {plugin}
    zili chips {name}          # is it found, and what is missing
    zili doctor --chip {name}  # what works, how fast; then write it into zili_{name}.py
    pytest                     # the checks a backend must pass
    zili align RECIPE --set chip.name={name}   # the first operation that is wrong, if one is
    zili train RECIPE --set chip.name={name}
"""


def write_skeleton(name: str, folder: Path, device_type: str, collectives: str, plugin: str) -> list[Path]:
    """Write a plugin package for backend `name` into `folder`; returns its files.

    Raises:
        ChipError: the name or device type is taken or no identifier, or the folder is there already.
    """
    for what in (name, device_type):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", what):
            raise ChipError(f"{what!r} cannot be a name: small letters, digits and _, a letter first")
        for other in registry().backends:
            if what in (other.name, other.device_type):
                raise ChipError(f"{other.name} ({other.device_type}) has {what!r} already; choose another name")
    if folder.exists():
        raise ChipError(f"{folder} is there already; remove it or choose another with --folder")
    stated = "\n".join(
        f'        "{key}": Capability(False, "not looked at yet"),  # {meaning.promise}'
        for key, meaning in CAPABILITIES.items()
    )
    values = {
        "name": name,
        "upper": name.upper(),
        "device_type": device_type,
        "collectives": collectives,
        "plugin": plugin,
        "capabilities": stated,
    }
    files = {
        "pyproject.toml": _PYPROJECT,
        f"zili_{name}.py": _RECORD,
        "tests/test_conformance.py": _TEST,
        "README.md": _README,
    }
    (folder / "tests").mkdir(parents=True)
    for path, text in files.items():
        (folder / path).write_text(text.format(**values), encoding="utf-8")
    return [folder / path for path in files]
