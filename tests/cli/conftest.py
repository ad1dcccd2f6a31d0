"""The command line, called as its entry point is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import Outcome, Zili

from zili.cli import main
from zili.config import dump_recipe


@pytest.fixture
def zili(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Zili:
    """`zili("train", path, ...)` runs `main` in this process; a traceback fails the test by itself."""
    monkeypatch.setattr("zili.training.trainer.matmul_peak", lambda *_: 1e11)  # 0.3 s a run
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["zili", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def recipe_file(recipe: Callable, tmp_path: Path) -> Path:
    """A tiny recipe on disk that trains into `tmp_path / "run"`."""
    path = tmp_path / "tiny.toml"
    plain = (f"chip.operations.{name}=reference" for name in ("linear", "attention"))
    path.write_text(dump_recipe(recipe(*plain)), encoding="utf-8")
    return path


@pytest.fixture
def listing(tmp_path: Path) -> Callable[[], list[str]]:
    """`listing()`: everything now below `tmp_path`."""
    return lambda: sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
