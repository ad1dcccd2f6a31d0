"""`zili quickstart`, from a text to a model that is evaluated, sampled, exported and loaded; and bad input."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zili.cli.quickstart import quickstart
from zili.errors import LayoutError
from zili.training.checkpoints import list_checkpoints

Listing = Callable[[], list[str]]
TINY = [
    *("model.hidden_size=32", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.head_dim=16"),
    *("model.ffn_hidden_size=48", "training.steps=4", "training.sequence_length=32", "training.global_batch=4"),
    *("schedule.warmup_steps=1", "chip.name=cpu", "chip.compile=false", "checkpoint.every=2"),
    *("chip.operations.linear=reference", "chip.operations.attention=reference"),
]
SMALL = [word for override in TINY for word in ("--set", override)]
PHRASES = [
    "春眠不觉晓，处处闻啼鸟。",
    "def read(self):\n    return self.data\n",
    "a model learns from text.",
    "自立 👋🏽",
]


def made_up_text(seed: int) -> str:
    return "\n".join(random.Random(seed).choices(PHRASES, k=60))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of 40 texts, Chinese and Python among them."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(made_up_text(i), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


def test_the_whole_way(zili, text: Path, run: Path, tmp_path: Path) -> None:
    first = zili("quickstart", "--text", text, "--folder", run, *SMALL)
    assert first.code == 0, first
    assert "40 documents" in first.out and "this model" in first.out and "sample 1" in first.out
    for command in ("zili sample", "zili chat", "zili eval", "zili train", "zili report"):
        assert command in first.out.split("next:")[1]
    assert {path.name for path in run.iterdir()} == {
        *("checkpoints", "data", "metrics.jsonl", "recipe.toml", "report.html"),
        *("samples.jsonl", "summary.json", "tokenizer"),
    }
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000002", "step-00000004"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]
    assert all(0 < r["bits_per_byte"] < 20 for r in records if r["kind"] == "eval")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert all(len(choice["reason"]) > 3 for choice in summary["choices"])
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report and "http://" not in report.replace("http://www.w3.org", "")

    again = zili("quickstart", "--text", text, "--folder", run)
    assert again.code == 0 and "reused" in again.out and "at step 4" in again.out
    more = zili("quickstart", "--text", text, "--folder", run, "--set", "training.steps=6")
    assert more.code == 0, more
    assert list_checkpoints(run / "checkpoints")[-1].name == "step-00000006"

    _is_used(zili, run, text, tmp_path / "published")


def _is_used(zili, run: Path, text: Path, published: Path) -> None:
    import zili as package
    from zili.training.restoring import load_model

    shown = zili("config", "show", run / "recipe.toml")
    assert shown.code == 0 and "# chip.name = cpu" in shown.out
    score = json.loads(zili("eval", run, "--text", text / "01.txt", "--json").out)
    assert score["bytes"] == (text / "01.txt").stat().st_size
    drawn = zili("sample", run, "--prompt", "春眠", "--max-new-tokens", "5", "--seed", "3")
    assert drawn.code == 0 and drawn.out.startswith("春眠")
    assert zili("sample", run, "--prompt", "春眠", "--max-new-tokens", "5", "--seed", "3").out == drawn.out
    exported = zili("export", run, "--to", published)
    assert exported.code == 0, exported
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(package.load(published)(ids), load_model(run)(ids), rtol=0, atol=1e-5)


def test_how_long_a_new_run_is_follows_from_the_minutes_and_stands_in_its_recipe(
    zili, text: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zili.runs.quickstart._SECONDS_AFTER_TRAINING", 27)  # of 30
    untold = [word for override in TINY if not override.startswith("training.steps") for word in ("--set", override)]
    outcome = zili("quickstart", "--text", text, "--folder", run, "--minutes", "0.5", *untold)
    assert outcome.code == 0 and "training.steps = as many as fit: --minutes 0.5" in outcome.out, outcome
    recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
    steps = int(list_checkpoints(run / "checkpoints")[-1].name.removeprefix("step-"))
    assert recipe["training"]["steps"] == steps and steps != 100, "the guess was 200 a minute"
    assert 0 < recipe["schedule"]["decay_start"] <= steps
    assert (
        f"step {steps:,} will be the last" in outcome.out and "stopped early" not in (run / "report.html").read_text()
    )
    again = zili("quickstart", "--text", text, "--folder", run)
    assert again.code == 0 and f"training.steps = {steps}: the run's own" in again.out


def test_restart_drops_the_earlier_run_and_nothing_else(zili, text: Path, run: Path) -> None:
    assert zili("quickstart", "--text", text, "--folder", run, *SMALL).code == 0
    (run / "mine.md").write_text("notes")
    refused = zili("quickstart", "--text", text, "--folder", run, "--restart", *SMALL, "--set", "sede=1")
    assert refused.code == 3 and (run / "checkpoints").exists(), "a mistyped override costs nobody a run"
    outcome = zili("quickstart", "--text", text, "--folder", run, "--restart", *SMALL, "--set", "seed=1")
    assert outcome.code == 0 and "resumed" not in outcome.out
    assert (run / "mine.md").read_text() == "notes"


def test_other_text_in_the_folder_of_a_run_is_refused(zili, text: Path, run: Path, tmp_path: Path) -> None:
    assert zili("quickstart", "--text", text, "--folder", run, *SMALL).code == 0
    other = tmp_path / "other.txt"
    other.write_text("".join(made_up_text(seed) for seed in range(99, 110)), encoding="utf-8")
    outcome = zili("quickstart", "--text", other, "--folder", run)
    assert outcome.code == 4
    assert "other data (sources changed)" in outcome.err and "another folder" in outcome.err
    assert zili("quickstart", "--text", text, "--folder", run).code == 0


def test_the_command_to_go_on_holds_what_the_text_needs() -> None:
    from zili.cli.options import OnError
    from zili.cli.quickstart import _command

    text = [Path("my books"), Path("b.jsonl")]
    expected = "zili quickstart --text 'my books' --text b.jsonl --folder runs/x --text-field body --on-error skip"
    assert _command(text, Path("runs/x"), "body", OnError.SKIP).endswith(expected)
    assert _command([], Path("runs/quickstart"), "text", OnError.RAISE).endswith("zili quickstart")


GOOD = json.dumps({"text": made_up_text(1)}, ensure_ascii=False)
BROKEN: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "an empty folder": ({}, ["no readable text", "Give files or folders with"]),
    "nothing but pictures": ({"a.png": b"\x89PNG", "b.zip": b"PK"}, ["no readable text", "2 of another kind"]),
    "broken UTF-8": ({"a.txt": "好\n好".encode() + b"\xff"}, ["a.txt", "line 2, byte 7", "--on-error skip"]),
    "a broken JSON line": (
        {"a.jsonl": f'{GOOD}\n{{"text": \n'.encode()},
        ["a.jsonl: line 2, column", "broken JSON", "--on-error skip"],
    ),
    "a wrong field name": ({"a.jsonl": f'{GOOD}\n{{"txt": "x"}}\n'.encode()}, ["a.jsonl: line 2", "'txt'", "'text'"]),
    "too little text": ({"a.txt": b"hello"}, ["5 bytes of text", "Give more text"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_text_is_refused_with_file_place_and_way_out_and_leaves_nothing(
    zili, tmp_path: Path, run: Path, listing: Listing, case: str
) -> None:
    files, parts = BROKEN[case]
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    before = listing()
    outcome = zili("quickstart", "--text", folder, "--folder", run, *SMALL)
    assert outcome.code == 4, outcome
    assert outcome.err.startswith("zili: ") and "Traceback" not in outcome.err
    assert str(folder) in outcome.err or case == "too little text"
    assert all(part in outcome.err for part in parts), outcome.err
    assert [path for path in listing() if path not in before] in ([], ["runs", "runs/first"])


def test_a_text_that_is_not_there(zili, run: Path, listing: Listing) -> None:
    outcome = zili("quickstart", "--text", "nowhere.txt", "--folder", run)
    assert outcome.code == 4 and "nowhere.txt: no such file or folder" in outcome.err
    assert [path for path in listing() if "first/" in path] == []


@pytest.mark.parametrize(
    ("override", "code", "part"),
    [
        ("chip.name=asend", 6, "did you mean ascend"),
        ("trainin.steps=3", 3, "did you mean training?"),
        ("schedule.warmup_steps=9", 3, "warmup_steps (9)"),
        ("folder=elsewhere", 3, "use --folder"),
    ],
)
def test_a_bad_setting_is_refused_before_the_text_is_read(
    zili, text: Path, run: Path, listing: Listing, override: str, code: int, part: str
) -> None:
    before = listing()
    outcome = zili("quickstart", "--text", text, "--folder", run, *SMALL, "--set", override)
    assert outcome.code == code and part in outcome.err
    assert listing() == before


def test_a_damaged_token_store_is_built_again(zili, text: Path, run: Path) -> None:
    assert zili("quickstart", "--text", text, "--folder", run, *SMALL).code == 0
    (run / "data" / "train.bin").write_bytes(b"1234")
    outcome = zili("quickstart", "--text", text, "--folder", run)
    assert outcome.code == 0 and "again" in outcome.out and "train.bin" in outcome.out


def test_a_damaged_token_store_that_no_run_has_read_is_built_again(zili, text: Path, run: Path) -> None:
    refused = zili("quickstart", "--text", text, "--folder", run, *SMALL, "--set", "model.vocab_size=265")
    assert refused.code == 3 and "model.vocab_size is 265" in refused.err
    (run / "data" / "train.bin").write_bytes(b"1234")
    outcome = zili("quickstart", "--text", text, "--folder", run, *SMALL)
    assert outcome.code == 0 and "train.bin" in outcome.out and "again" in outcome.out


def test_restart_keeps_the_earlier_run_when_the_new_text_cannot_be_read(zili, text: Path, run: Path) -> None:
    assert zili("quickstart", "--text", text, "--folder", run, *SMALL).code == 0
    before = sorted(path.name for path in run.iterdir())
    assert zili("quickstart", "--restart", "--text", run.parent / "nowhere", "--folder", run).code == 4
    assert sorted(path.name for path in run.iterdir()) == before


def test_several_processes_are_refused_before_each_prepares_the_same_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LayoutError, match="is one process"):
        quickstart(folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
