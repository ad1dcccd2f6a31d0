"""eval, sample, chat and report as a user types them, on a run folder and on a published one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from zili.chips import Device, activate, find_backend
from zili.cli.chat import chat
from zili.cli.eval import eval_
from zili.cli.report import report
from zili.cli.sample import sample
from zili.cli.serve import _hosts
from zili.data.tokenizer import Tokenizer
from zili.errors import CheckpointError, ConfigError, DataError
from zili.models.decoder import Decoder
from zili.parallel.layout import Layout
from zili.parallel.world import World
from zili.release import export_model
from zili.serving.model_folder import find_tokenizer, open_folder
from zili.training.checkpoints import RunState, model_tensors
from zili.training.saving import Saver


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    for name, command in (("eval", eval_), ("sample", sample), ("chat", chat), ("report", report)):
        app.command(name)(command)
    return app


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Decoder, tokenizer: Tokenizer) -> Path:
    """A run as training leaves it, with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer.save(folder / "tokenizer")
    (folder / "recipe.toml").write_text("[training]\nsteps = 7\nsequence_length = 32\n")
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 7, "loss": 2.0}\n')
    state = RunState(7, 56, {"model": model.config.model_dump(mode="json")}, "none")
    saver = Saver(
        folder / "checkpoints", World(Layout(), Device(activate(find_backend("cpu")))), keep=1, asynchronous=False
    )
    saver.save(state, model_tensors(list(model.named_parameters())))
    saver.wait()
    return folder


@pytest.fixture(scope="module")
def published(run: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """The same model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("published") / "model"
    export_model(run, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.md"
    path.write_text("hello, world 春眠不觉晓\n" * 20, encoding="utf-8")
    return path


def typed(app: typer.Typer, *arguments: object, **how) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, **how)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_kind_of_folder_gives_the_same_model(run: Path, published: Path) -> None:
    places = (run, run / "checkpoints", run / "checkpoints" / "step-00000007", published)
    opened = [open_folder(place) for place in places]
    weights = [o.model.norm.weight.sum() + o.model.head_weight.sum() for o in opened]
    assert all(weight == weights[0] for weight in weights)
    assert [o.training_length for o in opened] == [32, 32, 32, 64]
    assert [o.conversational for o in opened] == [False, False, False, True]


def test_eval_prints_a_table_and_json(app: typer.Typer, run: Path, text: Path) -> None:
    table = typed(app, "eval", run, "--text", text)
    assert "xz -9e" in table and "zstd -19" in table and f"1 document, {text.stat().st_size} bytes" in table
    record = json.loads(typed(app, "eval", run, "--text", text, "--json"))
    assert record["bytes"] == text.stat().st_size and record["bits_per_byte"] > 0
    assert [c["name"] for c in record["compressors"]] == ["xz -9e", "zstd -19"]
    cut = json.loads(typed(app, "eval", run, "--text", text, "--json", "--max-bytes", 100))
    assert 97 <= cut["bytes"] <= 100 and cut["compressors"][0]["bytes"] == cut["bytes"]


def test_eval_refuses_what_it_cannot_read(app: typer.Typer, run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        typed(app, "eval", run, "--text", tmp_path / "absent.md")
    arguments = ["eval", str(run), "--text", str(tmp_path), "--on-error", "perhaps"]
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_sample_is_repeatable_and_begins_with_the_prompt(app: typer.Typer, run: Path) -> None:
    asked = ("sample", run, "--prompt", "def read", "--max-new-tokens", 12, "--seed", 3)
    assert typed(app, *asked) == typed(app, *asked)
    assert typed(app, *asked).startswith("def read")
    lines = typed(app, *asked, "--number", 3, "--json").splitlines()
    drawn = [json.loads(line) for line in lines]
    assert [d["seed"] for d in drawn] == [3, 4, 5] and len({d["text"] for d in drawn}) > 1
    assert typed(app, *asked) == "def read" + drawn[0]["text"] + "\n"


def test_sample_with_no_prompt_and_with_one_too_long(app: typer.Typer, run: Path) -> None:
    assert typed(app, "sample", run, "--max-new-tokens", 5)
    with pytest.raises(ConfigError, match="context holds 64"):
        typed(app, "sample", run, "--prompt", "0 " * 200)
    with pytest.raises(ConfigError, match="top_p"):
        typed(app, "sample", run, "--top-p", 2)


def test_chat_reads_a_pipe(app: typer.Typer, run: Path, published: Path) -> None:
    for folder, greeting in ((run, "base model"), (published, "Chat.")):
        result = CliRunner().invoke(
            app,
            ["chat", str(folder), "--max-new-tokens", "4"],
            input="hello\n/reset\n中文".encode() + b" \xff\n/exit\nnever\n",
            catch_exceptions=False,
        )
        assert result.exit_code == 0
        assert greeting in result.stderr and greeting not in result.stdout


def test_chat_mode_can_be_asked_for(app: typer.Typer, run: Path) -> None:
    result = CliRunner().invoke(app, ["chat", str(run), "--mode", "chat"], input="", catch_exceptions=False)
    assert "Chat." in result.stderr


def test_report(app: typer.Typer, run: Path) -> None:
    assert "report.html" in typed(app, "report", run)
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_folders_without_what_is_needed(tmp_path: Path, model: Decoder) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        find_tokenizer(tmp_path)


def test_a_tokenizer_of_another_model(run: Path, tmp_path: Path, published: Path) -> None:
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    Tokenizer.train([chr(i) * 9 for i in range(0x4E00, 0x4F00)], vocab_size=600).save(tmp_path)
    with pytest.raises(CheckpointError, match="do not belong together"):
        open_folder(tmp_path)


@pytest.mark.parametrize("words", [("sample", "x"), ("chat", "x"), ("eval", "x", "--text", "x"), ("serve", "x")])
def test_the_chip_is_chosen_before_torch_loads(words: tuple[str, ...], tmp_path: Path) -> None:
    """What a vendor's plugin reads from the environment must be there by then."""
    code = (
        "import sys\n"
        "from zili import chips\n"
        "chips.activate = lambda backend: sys.exit(20 + ('torch' in sys.modules))\n"
        "from zili.cli import main\n"
        "main()\n"
    )
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").touch()
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 20, done.stderr


@pytest.mark.parametrize("name", ["http://chat.example.org", "chat.example.org:80", "a b", "", "*", "a..b"])
def test_what_is_no_name_of_a_host(name: str) -> None:
    with pytest.raises(typer.BadParameter, match="no name of a host"):
        _hosts([name])
    assert _hosts(["chat.example.org", "gateway"]) == ["chat.example.org", "gateway"]
