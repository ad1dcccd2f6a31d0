"""How Zili gets onto a machine: which build of torch, and a wheel that needs no checkout."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("install_torch", ROOT / "tools" / "install_torch.py")
assert SPEC is not None and SPEC.loader is not None
install_torch = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(install_torch)


def make_index(folder: Path, *versions: str) -> str:
    """An index of Python packages in a folder, with a torch of no content in each version; its address."""
    project = folder / "torch"
    project.mkdir(parents=True)
    links = []
    for version in versions:
        name = f"torch-{version}-py3-none-any.whl"
        metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        files = {
            f"torch-{version}.dist-info/METADATA": metadata,
            f"torch-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{file},,\n" for file in [*files, f"torch-{version}.dist-info/RECORD"])
        with zipfile.ZipFile(project / name, "w") as wheel:
            for file, content in {**files, f"torch-{version}.dist-info/RECORD": record}.items():
                wheel.writestr(file, content)
        sha = hashlib.sha256((project / name).read_bytes()).hexdigest()
        links.append(f'<a href="{name.replace("+", "%2B")}#sha256={sha}">{name}</a>')
    (project / "index.html").write_text("<!doctype html><html><body>" + "\n".join(links) + "</body></html>")
    return folder.as_uri()


BOTH, CUDA_ONLY, CPU_ONLY = ("2.13.0", "2.13.0+cpu"), ("2.13.0",), ("2.13.0+cpu",)


@pytest.mark.parametrize(
    ("own", "cpu_index", "installed", "said"),
    [
        pytest.param(BOTH, (), "2.13.0+cpu", "", marks=pytest.mark.slow),
        (CUDA_ONLY, CPU_ONLY, "2.13.0+cpu", ""),
        pytest.param(CUDA_ONLY, (), "2.13.0", "TORCH_OPTIONS", marks=pytest.mark.slow),
    ],
)
def test_which_build_of_torch_comes(
    own: tuple[str, ...],
    cpu_index: tuple[str, ...],
    installed: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", make_index(tmp_path / "own", *own))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "here"))
    monkeypatch.setenv("PIP_NO_DEPS", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    second = make_index(tmp_path / "second", *cpu_index)
    wanted = install_torch.attempts([], linux=True, nvidia=False, cpu_index=second)
    assert install_torch.install(wanted) == 0
    assert [path.name for path in (tmp_path / "here").glob("torch-*")] == [f"torch-{installed}.dist-info"]
    heard = capfd.readouterr().err
    assert (said in heard and heard.count("\n") == 1) if said else heard == "", heard


def test_options_and_other_systems_are_left_to_pip() -> None:
    own = ["--index-url", "https://example.org/simple"]
    assert install_torch.attempts(own, linux=True, nvidia=False) == [[*own, "torch==2.13.0"]]
    assert install_torch.attempts([], linux=False, nvidia=False) == [["torch==2.13.0"]]
    assert install_torch.attempts([], linux=True, nvidia=True) == [["torch==2.13.0"]]


def test_the_makefile_installs_what_the_project_is_tested_with() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"torch=={install_torch.VERSION}" in makefile and "tools/install_torch.py" in makefile


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the wheel, which was built from a copy of what a clone has."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    hidden = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "zili", source / "zili", ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_every_file_of_the_package(site: Path) -> None:
    there = {path.relative_to(site) for path in (site / "zili").rglob("*") if path.is_file()}
    ours = {
        path.relative_to(ROOT)
        for path in (ROOT / "zili").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert ours - there == set()


PAGE = """
import re, sys, pathlib
from importlib.resources import files
from zili.cli import main

page = files("zili.serving.http") / "page"
assert pathlib.Path(str(page)).is_relative_to(sys.argv.pop()), page
for part in re.findall(r'(?:src|href)="/?page/([^"]+)"', page.joinpath("index.html").read_text()):
    assert page.joinpath(part).read_bytes(), part
    print(part)
main()
"""


def test_a_command_and_the_chat_page_run_from_a_wheel_alone(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", PAGE, "chips", str(site)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"page.js", "page.css", "icon.svg"} <= set(done.stdout.split()) and "ascend-910b2" in done.stdout


def test_pyproject_and_readme_name_the_same_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    classified = {c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.findall(r"We run everything with Python (3\.\d+)", readme)
    assert set(told) == classified
    assert project["requires-python"] == f">={min(classified, key=lambda v: int(v.split('.')[1]))}"
