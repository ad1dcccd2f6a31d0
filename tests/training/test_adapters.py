"""Adapters of low rank: what is trained, what a checkpoint holds, and that they are merged for whoever reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import Recipe, Recorder, assert_same_bits, final_tensors, open_trainer, train

import zili
from zili.checksums import sha256, write_sums
from zili.errors import ConfigError
from zili.models.arithmetic import is_adapter, parameter_shapes, training_state_bytes
from zili.models.decoder import Decoder
from zili.release import export_model, fill_from, open_model, weights_fingerprint
from zili.release.verifying import verify_release
from zili.training.checkpoints import list_checkpoints

LORA = "model.lora={rank=4, alpha=16.0}"


def test_only_adapters_move_and_shapes_are_as_counted(recipe: Recipe) -> None:
    config = recipe(LORA)
    before = Decoder(config.model)
    before.init_weights(config.seed)
    trainer = train(config)
    shapes = parameter_shapes(config.model)
    after = dict(trainer.model.named_parameters())
    assert {name: tuple(p.shape) for name, p in after.items()} == shapes
    assert shapes["layers.1.feed_forward.down.lora_a"] == (4, 48)
    assert shapes["layers.1.feed_forward.down.lora_b"] == (32, 4)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after[name]) == (not is_adapter(name)), name
    stored = final_tensors(config)
    moments = {name.split(".", 1)[1].rpartition(".")[0] for name in stored if name.startswith("optimizer.")}
    assert moments == {name for name in shapes if is_adapter(name)}
    state = training_state_bytes(config.model)
    adapters = sum(p.numel() for name, p in after.items() if is_adapter(name))
    assert (state.gradients, state.optimizer) == (4 * adapters, 8 * adapters)


def test_an_adapter_adds_nothing_at_first(recipe: Recipe) -> None:
    ids = torch.arange(20)[None]
    plain, adapted = (Decoder(recipe(*extra).model).eval() for extra in ((), (LORA,)))
    with torch.no_grad():
        assert torch.equal(plain(ids), adapted(ids))


def test_whoever_reads_a_checkpoint_finds_them_merged(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(LORA, "training.steps=4")
    trainer = train(config)
    trainer.model.eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = trainer.model(ids)
        plain = zili.load(config.folder)
        assert plain.config.lora is None and not any(is_adapter(name) for name, _ in plain.named_parameters())
        assert (plain(ids) - expected).abs().max() < 1e-5 * expected.abs().max()
        base = Decoder(plain.config).eval()
        base.init_weights(config.seed)
        assert (base(ids) - expected).abs().max() > 1e-3
    assert export_model(config.folder, tmp_path / "out", layout="llama").difference <= 1e-4
    verify_release(tmp_path / "out", against=config.folder)


def test_a_run_with_adapters_goes_on_bit_by_bit_and_starts_from_a_plain_model(recipe: Recipe, tmp_path: Path) -> None:
    base = train(recipe("training.steps=2", f"folder={tmp_path / 'base'}"))
    start = [LORA, f"training.start_from={tmp_path / 'base'}"]

    def run(folder: str, *steps: int) -> tuple[Recorder, dict[str, torch.Tensor]]:
        seen = Recorder()
        for count in steps:
            config = recipe(*start, f"training.steps={count}", f"folder={tmp_path / folder}", "schedule.kind=constant")
            trainer = open_trainer(config, [seen])
            if not trainer.resume():
                fill_from(trainer.parallel.parts, open_model(tmp_path / "base"))
            trainer.fit()
        return seen, final_tensors(config)

    whole, parts = run("whole", 6), run("parts", 3, 6)
    assert_same_bits(whole[1], parts[1])
    assert whole[0].losses == parts[0].losses
    assert torch.equal(whole[1]["model.norm.weight"], base.model.norm.weight)  # type: ignore[union-attr]


def test_a_part_of_a_merged_matrix_is_that_of_the_whole(recipe: Recipe) -> None:
    from zili.release.checkpoint import open_checkpoint

    config = recipe(LORA, "training.steps=2")
    train(config)
    _, tensors, _ = open_checkpoint(config.folder)
    name = "layers.0.feed_forward.up.weight"
    whole = tensors.read(name)
    part = (slice(5, 17), slice(3, 30))
    assert torch.allclose(tensors.read(name, part), whole[part], atol=1e-6)


def test_adapters_count_in_a_fingerprint_of_weights(recipe: Recipe) -> None:
    config = recipe(LORA, "training.steps=2", "checkpoint.every=1")
    train(config)
    steps = list_checkpoints(config.folder / "checkpoints")
    assert len({weights_fingerprint(open_model(place)) for place in (config.folder, *steps)}) == len(steps) == 2


def test_matrices_that_are_not_there_are_named(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"lora\.matrices: 'keys' is none of this model's: query, key"):
        recipe("model.lora={matrices=['query', 'keys']}")


EXPERTS = "model.mixture={experts=4, top_k=2, ffn_hidden_size=32%s}"


@pytest.mark.parametrize(
    ("overrides", "adapted"),
    [
        (("model.lora={matrices=[]}",), "down"),
        # Routed experts get no adapters, so there is none where these matrices are theirs alone.
        (("model.lora={matrices=['gate', 'up', 'down']}", EXPERTS % ""), "output"),
    ],
)
def test_adapters_that_leave_nothing_to_train_are_refused(
    recipe: Recipe, overrides: tuple[str, ...], adapted: str
) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.matrices \[.*leaves nothing to train; name some of .*{adapted}$"):
        recipe(*overrides)


@pytest.mark.parametrize("more", [", shared_experts=1", ", dense_layers=1"])
def test_adapters_of_what_is_beside_the_experts_are_trained(recipe: Recipe, more: str) -> None:
    config = recipe("model.lora={matrices=['gate']}", EXPERTS % more)
    assert any(is_adapter(name) for name in parameter_shapes(config.model))


def test_a_run_from_before_adapters_and_fp32_tables_goes_on(recipe: Recipe) -> None:
    """Its run.json has none of the keys that came later."""
    train(recipe("training.steps=2"))
    (checkpoint,) = (recipe().folder / "checkpoints").glob("step-*")
    state = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    del state["config"]["model"]["lora"], state["config"]["model"]["rotary"]["half_tables"]
    (checkpoint / "run.json").write_text(json.dumps(state), encoding="utf-8")
    files = [file for file in checkpoint.iterdir() if file.name != "SHA256SUMS"]
    write_sums(checkpoint, {file.name: sha256(file) for file in files})
    assert train(recipe("training.steps=3")).step == 3
