"""The house keeps its own rules: who imports whom, where vendors are named, what loads without torch.

The checker reads source only. Planted violations at the end show that it can fail.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import zili
from zili.torch_private import IN_PLACE

PACKAGE = Path(zili.__file__).parent

FLOORS = {
    0: (
        "errors",
        "durable",
        "checksums",
        "user_cache",
        "exposition",
        "plurals",
        "torch_private",
        "plugins",
        "config",
        "chips",
        "pages",
    ),
    1: ("ops", "data"),
    2: ("models",),
    3: ("objectives", "parallel"),
    4: ("training", "planning"),
    5: ("rehearsal", "release", "evaluation", "serving", "diagnosis", "runs", "supervision", "cloud"),
    6: ("api", "cli"),
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
ENTRANCES = ("__init__", "__main__")
"""Files of the package itself; they open the house and stand on no floor."""

WITHOUT_TORCH = (
    *("errors", "exposition", "torch_private", "plugins", "config", "chips", "pages", "planning", "runs", "api"),
    "cloud",
)
VENDORS = {"ascend", "cambricon", "nvidia"}
VENDOR_WORDS = VENDORS | {"npu", "mlu", "cuda", "nccl", "hccl", "cncl", "torch_npu", "torch_mlu"}


TWO_CLASSES = {
    "Guide": "an interface, and what Zili has of it",
    "Message": "one of a chat, in OpenAI's words; and one between processes",
}
"""Names that two classes may have, and why."""
USED_IN_PLACE = {private.path.replace(":", ".") for private in IN_PLACE}


class Source:
    """One file of the package, parsed."""

    def __init__(self, path: Path, package: Path) -> None:
        self.parts = path.relative_to(package.parent).with_suffix("").parts
        self.where = str(path.relative_to(package.parent))
        self.room = self.parts[1]
        self.tree = ast.parse(path.read_text(encoding="utf-8"))

    def imports(self, tree: ast.AST | None = None) -> Iterator[tuple[int, str]]:
        """(line, full dotted name) of all that is imported, wherever the statement stands."""
        for node in ast.walk(tree or self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                here = self.parts[: len(self.parts) - node.level] if node.level else ()
                base = [*here, *([node.module] if node.module else [])]
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)

    def imports_on_loading(self) -> Iterator[tuple[int, str]]:
        """Imports that run when the file is imported: not those in functions or under TYPE_CHECKING."""
        waiting: list[ast.AST] = [self.tree]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                waiting += node.orelse
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield from self.imports(node)
            waiting += ast.iter_child_nodes(node)


@cache
def sources(package: Path) -> list[Source]:
    return [Source(path, package) for path in sorted(package.rglob("*.py"))]


def room_imports(source: Source, package: Path) -> Iterator[tuple[int, str]]:
    for line, name in source.imports():
        top, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        if top == package.name and room in FLOOR:
            yield line, room


def unknown_rooms(package: Path) -> list[str]:
    return [s.where for s in sources(package) if s.room not in FLOOR and s.room not in ENTRANCES]


def upward_imports(package: Path) -> list[str]:
    return [
        f"{source.where}:{line} {source.room} (floor {FLOOR[source.room]}) -> {room} (floor {FLOOR[room]})"
        for source in sources(package)
        if source.room in FLOOR
        for line, room in room_imports(source, package)
        if FLOOR[room] > FLOOR[source.room]
    ]


def circles(package: Path) -> list[str]:
    """Rooms of one floor that reach themselves through each other."""
    reaches: dict[str, set[str]] = defaultdict(set)
    for source in sources(package):
        for _, room in room_imports(source, package):
            if room != source.room and FLOOR.get(source.room) == FLOOR[room]:
                reaches[source.room].add(room)

    def reachable(room: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(reaches[room])
        while waiting:
            current = waiting.pop()
            if current not in seen:
                seen.add(current)
                waiting += reaches[current]
        return seen

    return [f"{room} -> {sorted(reaches[room])}" for room in sorted(reaches) if room in reachable(room)]


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of attribute names and string constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def vendor_names(package: Path) -> list[str]:
    """Vendor words outside chips/ and ops/<vendor>.py; other files of ops/ may import the vendors' files."""
    found = []
    for source in sources(package):
        if source.room == "chips" or (source.room == "ops" and source.parts[-1] in VENDORS):
            continue
        for line, name in source.imports():
            own = source.room == "ops" and name.startswith(f"{package.name}.ops.")
            if not own and VENDOR_WORDS & set(name.split(".")):
                found.append(f"{source.where}:{line} import {name}")
        found += [
            f"{source.where}:{line} {word}"
            for line, word in words(source.tree)
            if word.partition(":")[0].lower() in VENDOR_WORDS
        ]
    return found


def torch_on_loading(package: Path) -> list[str]:
    return [
        f"{source.where}:{line} {name}"
        for source in sources(package)
        if source.room in WITHOUT_TORCH
        for line, name in source.imports_on_loading()
        if name.partition(".")[0] == "torch"
    ]


def private_names_of_torch(package: Path) -> list[str]:
    """Private names of torch outside of `torch_private`, but for those that it lists as used in their place."""
    return [
        f"{source.where}:{line} {name}"
        for source in sources(package)
        if source.room != "torch_private"
        for line, name in torch_names(source)
        if re.search(r"\._[a-z]", name, re.IGNORECASE)
        and not any(path == name or path.startswith(f"{name}.") for path in USED_IN_PLACE)
    ]


def torch_names(source: Source) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of all that is imported from torch, and of attributes of it."""
    known = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for (line, name), alias in zip(source.imports(node), node.names, strict=True):
                if name.partition(".")[0] == "torch":
                    yield line, name
                    bare = isinstance(node, ast.Import) and alias.asname is None
                    known[alias.asname or alias.name.partition(".")[0]] = "torch" if bare else name
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in known:
                yield node.lineno, ".".join([known[first], *rest])


def unchecked_copies(package: Path) -> list[str]:
    """pydantic's ways to a configuration past its validators; `Section.changed` is the checked one."""
    return [
        f"{source.where}:{node.lineno} {node.attr}"
        for source in sources(package)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr in ("model_copy", "model_construct")
    ]


def names_of_two_classes(package: Path) -> list[str]:
    """Public classes of the same name: a reader who meets one takes it for the other."""
    places: dict[str, list[str]] = defaultdict(list)
    for source in sources(package):
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(f"{source.where}:{node.lineno}")
    return [f"{name}: {', '.join(all_)}" for name, all_ in places.items() if len(all_) > 1 and name not in TWO_CLASSES]


RULES = [
    names_of_two_classes,
    unchecked_copies,
    unknown_rooms,
    upward_imports,
    circles,
    vendor_names,
    torch_on_loading,
    private_names_of_torch,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_its_rules(rule):
    violations = rule(PACKAGE)
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize("module", ["zili", "zili.config", "zili.chips", "zili.errors", "zili.serving.handover"])
def test_importing_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def plant(folder: Path, **files: str) -> Path:
    """A package `zili` with the given sources; `data__x` stands for data/x.py."""
    package = folder / "zili"
    for name, text in files.items():
        path = package.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


PLANTED = [
    (names_of_two_classes, {"parallel__x": "class Layout: pass", "release__x": "class Layout: pass"}),
    (unknown_rooms, {"helpers__x": ""}),
    (upward_imports, {"data__x": "from zili.models.decoder import Decoder"}),
    (upward_imports, {"data__x": "def f():\n    import zili.cli.app"}),
    (upward_imports, {"data__x": "from zili import training"}),
    (upward_imports, {"data__x": "from ..models import decoder"}),
    (upward_imports, {"serving__x": "from zili.cli import main"}),
    (circles, {"release__x": "import zili.serving.y", "serving__y": "from zili.release import x"}),
    (vendor_names, {"training__x": "import torch\ntorch.cuda.synchronize()"}),
    (vendor_names, {"training__x": "device = 'npu:0'"}),
    (vendor_names, {"training__x": "if kind == 'NCCL': pass"}),
    (vendor_names, {"training__x": "import torch_mlu"}),
    (vendor_names, {"training__x": "from zili.chips.ascend import ASCEND"}),
    (vendor_names, {"ops__registry": "x.mlu()"}),
    (torch_on_loading, {"config__x": "import torch"}),
    (unchecked_copies, {"training__x": "config.model_copy(update={})"}),
    (private_names_of_torch, {"models__x": "import torch\ntorch._C._current_autograd_node()"}),
    (private_names_of_torch, {"models__x": "from torch.utils._pytree import tree_leaves"}),
    (private_names_of_torch, {"models__x": "from torch import distributed as dist\ndist._x"}),
]


@pytest.mark.parametrize(("rule", "files"), PLANTED)
def test_a_planted_violation_is_found(rule, files, tmp_path):
    assert rule(plant(tmp_path, **files))


LAZY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
ALLOWED = [
    (names_of_two_classes, {"parallel__x": "class _Layout: pass", "release__x": "class _Layout: pass"}),
    (upward_imports, {"models__x": "from zili.data.store import Store\nfrom zili.errors import DataError"}),
    (circles, {"release__x": "import zili.serving.y", "serving__y": "import zili.models"}),
    (vendor_names, {"chips__x": "'npu'", "ops__ascend": "'npu'", "ops__registry": "import zili.ops.ascend"}),
    (vendor_names, {"training__x": "'''cuda and npu are not named here'''\ndevice = 'cpu'"}),
    (torch_on_loading, {"chips__x": f"{LAZY}import torch\ndef f():\n    import torch"}),
]


@pytest.mark.parametrize(("rule", "files"), ALLOWED)
def test_what_is_allowed_passes(rule, files, tmp_path):
    assert not rule(plant(tmp_path, **files))


def test_no_two_test_files_have_one_name() -> None:
    """pytest takes the second for the first, where a whole suite is collected."""
    names = Counter(file.name for file in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
