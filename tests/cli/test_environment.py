"""What must be in the environment before torch is imported is there, whichever command imports it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    *("train {recipe}", "align {recipe}", "quickstart --text {text} --folder {folder}/run"),
    *("sample {folder} --prompt x", "chat {folder}", "serve {folder}", "eval {folder} --text {text}", "doctor"),
    *("import {folder} --to {folder}/a", "export {folder} --to {folder}/b", "verify {folder}"),
)
CALLED = """
import json, os, sys
from zili.cli import main

for words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv = ["zili", *words]
        main()
        os._exit(99)
    print(words[0], os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_every_command_sets_the_environment_before_it_imports_torch(recipe_file: Path, tmp_path: Path) -> None:
    """With a torch that says, at its import, whether the variables are there, and ends the process."""
    (tmp_path / "torch.py").write_text(
        'import os\nos._exit(40 + ("GOMP_SPINCOUNT" in os.environ) + ("TORCH_DEVICE_BACKEND_AUTOLOAD" in os.environ))\n'
    )
    (tmp_path / "config.json").touch()  # else it is plain at once that no model is there
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{number} a model learns from text 自立" for number in range(3000)), encoding="utf-8")
    words = [command.format(recipe=recipe_file, folder=tmp_path, text=text).split() for command in COMMANDS]
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CALLED, json.dumps(words)],
        env=environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    ended = re.findall(r"^\w+ -?\d+$", done.stdout, re.MULTILINE)
    assert done.stdout.startswith("run: "), "a line before torch is there: loading it takes seconds"
    assert ended == [f"{command[0]} 42" for command in words], done.stdout + done.stderr


def test_libgomp_takes_the_spins_from_the_environment_that_is_set() -> None:
    """libgomp itself says what it read: `OMP_DISPLAY_ENV` makes it."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    library = Path(torch.origin).with_name("lib") / "libgomp.so.1"
    if not library.exists():
        pytest.skip("this torch has another OpenMP")
    script = (
        "import ctypes; from zili import chips; chips.apply_environment(chips.find_backend('cpu')); "
        f"ctypes.CDLL({str(library)!r})"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    spins = next(line for line in said.stderr.splitlines() if "GOMP_SPINCOUNT" in line)
    assert 0 < int(spins.split("'")[1]) <= 20_000, spins
