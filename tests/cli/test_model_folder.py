"""`[model] folder` names a model, wherever it lies: a new run has its shape and begins with its weights."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zili.config import ModelConfig
from zili.errors import ConfigError
from zili.models.decoder import Decoder
from zili.release import export_model, import_model, load
from zili.runs.recipes import read_recipe
from zili.training.checkpoints import list_checkpoints

# As the tiny recipe's model, in another library's words.
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 304, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
STILL = ("--set", "training.steps=1", "--set", "optimizer.learning_rate=1e-30", "--set", "optimizer.weight_decay=0")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A Hugging Face folder, written by transformers."""
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)).save_pretrained(tmp_path / "published")
    return tmp_path / "published"


@pytest.fixture
def naming(recipe_file: Path, tmp_path: Path):
    """`naming(folder)`: the tiny recipe with nothing in `[model]` but what is given, into a run folder of its own."""

    def write(run: str = "tuned", **model: object) -> Path:
        table = tomllib.loads(recipe_file.read_text(encoding="utf-8"))
        table |= {"model": model, "folder": str(tmp_path / run)}
        path = tmp_path / f"{run}.toml"
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
        return path

    return write


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in load(folder).named_parameters()}


@pytest.mark.parametrize("kind", ["published", "imported", "gguf", "run", "checkpoint"])
def test_a_new_run_has_the_shape_and_the_weights_of_the_folder(
    zili, naming, published: Path, tmp_path: Path, kind: str
) -> None:
    folder = published
    if kind == "imported":
        import_model(published, tmp_path / "imported")
        folder = tmp_path / "imported"
    if kind == "gguf":
        pytest.importorskip("gguf")
        export_model(published, tmp_path / "release", layout="gguf")
        folder = tmp_path / "release" / "model.gguf"
    if kind in ("run", "checkpoint"):
        assert zili("train", naming("base", folder=str(published)), "--set", "training.steps=2").code == 0
        folder = tmp_path / "base"
        folder = list_checkpoints(folder / "checkpoints")[-1] if kind == "checkpoint" else folder
    outcome = zili("train", naming(folder=str(folder)), *STILL)
    assert outcome.code == 0, outcome
    assert f"weights from {folder}" in outcome.out.replace("\n", "")
    expected, found = weights(folder), weights(tmp_path / "tuned")
    assert all(torch.allclose(found[name], tensor, atol=1e-7) for name, tensor in expected.items())
    # Nothing but its own checkpoint is needed to go on.
    again = zili("train", tmp_path / "tuned" / "recipe.toml", "--set", "training.steps=2")
    assert again.code == 0 and "resumed from" in again.out


def test_adapters_begin_beside_the_folders_weights(zili, naming, published: Path, tmp_path: Path) -> None:
    outcome = zili("train", naming(folder=str(published), lora={"rank": 4}), "--set", "training.steps=1")
    assert outcome.code == 0 and f"weights from {published}" in outcome.out.replace("\n", "")
    before, after = load(published), load(tmp_path / "tuned")
    assert torch.equal(after.norm.weight, before.norm.weight), "adapters leave norms as they are"
    # What was tuned so is a model like others: its adapters are merged.
    outcome = zili("train", naming("further", folder=str(tmp_path / "tuned")), *STILL)
    assert outcome.code == 0, outcome
    further = weights(tmp_path / "further")
    assert all(torch.allclose(further[name], tensor, atol=1e-6) for name, tensor in weights(tmp_path / "tuned").items())


def test_a_shape_alone_is_asked_for_by_name(zili, naming, published: Path, tmp_path: Path) -> None:
    outcome = zili("train", naming(shape_of=str(published)), *STILL)
    assert outcome.code == 0 and "weights from" not in outcome.out
    with torch.device("meta"):
        drawn = Decoder(ModelConfig.model_validate(json.loads(dumped(tmp_path / "tuned"))))
    drawn.to_empty(device="cpu")
    drawn.init_weights(0)
    found = weights(tmp_path / "tuned")
    assert all(torch.allclose(found[name], tensor, atol=1e-7) for name, tensor in drawn.named_parameters())


def dumped(run: Path) -> str:
    """The shape that the run's checkpoint says it has."""
    state = json.loads((list_checkpoints(run / "checkpoints")[-1] / "run.json").read_text(encoding="utf-8"))
    return json.dumps(state["config"]["model"])


def test_adapters_of_no_model_are_refused_before_anything_is_written(zili, recipe_file: Path, tmp_path: Path) -> None:
    outcome = zili("train", recipe_file, "--set", "model.lora={rank=4}")
    assert outcome.code == 3 and "training.start_from" in outcome.err and "model.folder" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["folder", "shape_of"])
def test_a_folder_without_a_model_is_refused(zili, naming, tmp_path: Path, key: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        outcome = zili("train", naming(**{key: str(tmp_path / name)}))
        assert outcome.code == 3 and f"model.{key}" in outcome.err and name in outcome.err
    assert "give one of model.preset, model.folder" in zili("train", naming(folder="a", preset="b")).err


def test_a_published_model_that_is_unknown_says_why(zili, naming, published: Path) -> None:
    config = json.loads((published / "config.json").read_text(encoding="utf-8"))
    (published / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}), encoding="utf-8")
    outcome = zili("train", naming(folder=str(published)))
    assert outcome.code == 5 and "hidden_act" in outcome.err


def test_torch_is_not_loaded_before_the_chip_is_chosen(naming, published: Path) -> None:
    """The environment of a chip must be set before torch loads its plugin."""
    code = (
        "import sys; from pathlib import Path; from zili.runs.recipes import read_recipe\n"
        f"config = read_recipe(Path({str(naming(folder=str(published)))!r}))\n"
        "print(config.model.hidden_size, config.training.start_from, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.stdout.split() == ["32", str(published), "False"], said.stderr


def test_a_package_that_is_missing_is_no_broken_model(
    naming, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether torch is there to read the shape, or a process of its own does."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="pip install"):
        read_recipe(naming(folder=str(file)))

    def apart(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.argv", command[2:])
        monkeypatch.delitem(sys.modules, "zili.release.shape", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(command[2], run_name="__main__")
        return subprocess.CompletedProcess(command, int(str(ended.value.code)), "", capsys.readouterr().err)

    monkeypatch.setattr("zili.runs.recipes.subprocess.run", apart)
    monkeypatch.setattr("zili.cli.options.sys", SimpleNamespace(modules={}, executable=sys.executable))
    with pytest.raises(ConfigError, match="pip install"):
        read_recipe(naming(folder=str(file)))
