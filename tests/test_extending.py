"""The examples of docs/extending do what their pages say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from safetensors import safe_open
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """The module `examples/<name>.py`."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_a_metric_is_the_share_of_targets_above_one_half() -> None:
    from zili.config.model import ModelConfig
    from zili.data.loader import Batch
    from zili.objectives import Alone, learner

    config = ModelConfig(
        vocab_size=8, hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_hidden_size=16, max_length=16,
        init_std=2.0,
    )  # fmt: skip
    objective = example("own_metric").SureTokens()
    ids = torch.arange(12).view(2, 6) % 8
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    batch = Batch(ids, labels, torch.zeros_like(ids))
    model = learner(config, objective)
    found = model(ids, then=lambda outputs: objective.terms(outputs, batch, Alone()))
    chances = model(ids).softmax(-1)[:, :-1].gather(-1, labels[:, :-1, None])
    assert 0 < (chances > 0.5).sum() < 10, "some of either kind"
    assert (found.figures["sure"], found.count) == ((chances > 0.5).sum(), 10)
    assert found.loss.item() == pytest.approx(-chances.log().sum().item(), rel=1e-5)


def names_in(folder: Path) -> dict[str, bytes]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).view(torch.uint8).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def test_a_format_comes_back_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import zili
    from zili.release import export_model, exporting, opening

    acme = example("own_format").Acme()
    for module in (opening, exporting):
        monkeypatch.setattr(module, "LAYOUTS", (*opening.LAYOUTS, acme))
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    shape = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "llama")
    export_model(tmp_path / "llama", tmp_path / "acme", layout="acme")
    assert json.loads((tmp_path / "acme" / "config.json").read_text())["model_type"] == "acme"
    assert "model.layers.1.self_attn.out_proj.weight" in names_in(tmp_path / "acme")
    export_model(tmp_path / "acme", tmp_path / "back")
    assert names_in(tmp_path / "back") == names_in(tmp_path / "acme")
    ids = torch.arange(20)[None]
    assert torch.equal(zili.load(tmp_path / "acme")(ids), zili.load(tmp_path / "llama")(ids))


def test_a_command_counts_tokens(tiny_data: Path) -> None:
    from zili.data.tokenizer import Tokenizer

    app = typer.Typer()
    app.command()(example("own_command").tokens)
    said = CliRunner().invoke(app, [str(tiny_data / "tokenizer"), "self reliance"])
    expected = len(Tokenizer.from_folder(tiny_data / "tokenizer").encode("self reliance"))
    assert said.output == f"{expected} tokens\n"
    missing = CliRunner().invoke(app, [str(tiny_data / "nothing"), "self"])
    assert missing.exit_code and "does not exist" in str(missing.exception)
