"""Published folder -> Zili folder -> published folder: the same names, bytes and configuration."""

import json

import pytest
import torch
from published_folders import DENSE, PUBLISHED, golden_folder, write_checkpoint, write_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer import Typer
from typer.testing import CliRunner

import zili
from zili.config.mixture import LatentConfig, MixtureConfig
from zili.config.model import ModelConfig, RotaryConfig
from zili.config.presets import load_preset, preset_names
from zili.errors import CheckpointError, ConfigError
from zili.objectives import learner
from zili.release import export_model, fill_from, import_model, open_model
from zili.release.layouts.layout import PublishedConfig, Variant
from zili.release.native import write_native
from zili.release.opening import LAYOUTS
from zili.release.tensors import HeldTensors


def stored(folder):
    """Every tensor of a folder as (dtype, shape, bytes)."""
    files = [file for file in folder.glob("*.safetensors") if file.name != "golden.safetensors"]
    tensors = {}
    for file in files:
        tensors |= load_file(file)
    for file in folder.glob("*.bin"):
        tensors |= torch.load(file, weights_only=True)
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def there_and_back(folder, tmp_path, **options):
    import_model(folder, tmp_path / "zili", **options)
    export_model(tmp_path / "zili", tmp_path / "back", **options)
    return tmp_path / "back"


def configs(*folders):
    return [json.loads((folder / "config.json").read_text()) for folder in folders]


@pytest.mark.parametrize("name", [*DENSE, "telechat3-moe"])
def test_golden_folders_come_back_byte_for_byte(name, tmp_path):
    folder = golden_folder(name)
    back = there_and_back(folder, tmp_path)
    assert stored(back) == stored(folder)
    before, after = configs(folder, back)
    assert before == {key: after[key] for key in before}
    assert set(after) - set(before) <= {"torch_dtype"}
    ids = torch.arange(30)[None]
    expected = zili.load(folder)(ids)
    for place in (tmp_path / "zili", back):
        assert torch.equal(zili.load(place)(ids), expected)


@pytest.mark.parametrize("layout", PUBLISHED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_layout_comes_back_byte_for_byte(publish, layout, dtype, tmp_path):
    folder = publish(layout, dtype)
    back = there_and_back(folder, tmp_path)
    assert stored(back) == stored(folder)
    before, after = configs(folder, back)
    assert after == {**before, "torch_dtype": str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("repeated", [False, True])
def test_a_tied_model_keeps_its_number_of_tensors(publish, repeated, tmp_path):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not repeated:
            del tensors["lm_head.weight"]

    folder = publish("llama", changes={"tie_word_embeddings": True}, edit=tie)
    assert zili.load(folder).head is None
    assert stored(there_and_back(folder, tmp_path)) == stored(folder)


def test_small_shards_with_an_index(publish, tmp_path):
    folder = publish("telechat2")
    back = there_and_back(folder, tmp_path, max_shard_bytes=6000)
    files = sorted(file.name for file in back.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in stored(folder).values())
    assert stored(back) == stored(folder)
    assert all(sum(t.nbytes for t in load_file(back / file).values()) <= 6000 for file in files)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_pickled_weights_are_read(publish, tmp_path, zipped, sharded):
    folder = publish("llama")
    expected = stored(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    groups = [names[:7], names[7:]] if sharded else [names]
    files = [f"pytorch_model-{i}.bin" if sharded else "pytorch_model.bin" for i in range(len(groups))]
    for file, group in zip(files, groups, strict=True):
        part = {name: tensors[name].clone() for name in group}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
    if sharded:
        homes = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": homes}))
    assert stored(there_and_back(folder, tmp_path)) == expected


def test_tokenizer_files_travel(publish, tmp_path):
    folder = publish("llama")
    names = ["tokenizer.json", "special_tokens_map.json", "generation_config.json", "modeling_telechat.py"]
    for name in names[1:]:
        (folder / name).write_text(f"this is {name}")
    write_tokenizer(folder)
    (folder / "optimizer.pt").write_text("not this")
    back = there_and_back(folder, tmp_path)
    for name in names:
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert not (back / "optimizer.pt").exists()


def test_a_dtype_is_converted_to_when_asked(publish, tmp_path):
    folder = publish("telechat52", torch.float32)
    back = there_and_back(folder, tmp_path, dtype=torch.bfloat16)
    before, after = stored(folder), load_file(back / "model.safetensors")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert configs(back)[0]["torch_dtype"] == "bfloat16"
    assert set(after) == set(before)
    assert zili.load(back, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    assert zili.load(back).norm.weight.dtype == torch.float32


@torch.no_grad()
def test_a_folder_transformers_saved_and_one_it_loads(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=72,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    )
    llama = LlamaForCausalLM(config)
    llama.save_pretrained(tmp_path / "saved")
    ids = torch.arange(40)[None]
    torch.testing.assert_close(zili.load(tmp_path / "saved")(ids), llama(ids).logits, atol=1e-4, rtol=0)
    # As if Zili had trained it: no original configuration to fall back on.
    back = there_and_back(tmp_path / "saved", tmp_path)
    content = json.loads((tmp_path / "zili" / "model.json").read_text())
    (tmp_path / "zili" / "model.json").write_text(json.dumps({**content, "source": None}))
    export_model(tmp_path / "zili", tmp_path / "fresh", layout="llama")
    for place in (back, tmp_path / "fresh"):
        loaded = AutoModelForCausalLM.from_pretrained(place)
        assert torch.equal(loaded(ids).logits, llama(ids).logits)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_layout_that_holds_it(name):
    config = ModelConfig(**load_preset(name))
    holding = [layout.name for layout in LAYOUTS if not layout.unsupported(config)]
    families = {"telechat_ntk": "telechat2", "telechat3_yarn": "telechat3", "tele_flm_ntk": "teleflm"}
    assert holding[0] == ("deepseek" if config.latent else families[config.rotary.rule])
    assert ("telechat52" in holding) == (name in ("telechat-52b", "tele-flm-52b", "tele-flm-1t"))


SMALL = {"vocab_size": 72, "hidden_size": 32, "layers": 2, "heads": 4, "head_dim": 8, "ffn_hidden_size": 40}
YARN = RotaryConfig(rule="yarn", factor=4.0, original_length=2048, attention_factor=1.2)
HELD = {
    "telechat2": ModelConfig(
        **SMALL,
        kv_heads=2,
        attention_output_bias=True,
        ffn_down_bias=True,
        rotary=RotaryConfig(rule="telechat_ntk", base=1e6, original_length=64, training_length=128),
    ),
    "telechat52": ModelConfig(
        **SMALL,
        kv_heads=4,
        logit_multiplier=1 / 49,
        rotary=RotaryConfig(rule="tele_flm_ntk", original_length=4096),
    ),
    "llama": ModelConfig(**SMALL, kv_heads=1, tied_embeddings=True, rotary=YARN),
    "telechat2 with experts": ModelConfig(
        **{**SMALL, "ffn_hidden_size": 24},
        kv_heads=4,
        attention_output_bias=True,
        mixture=MixtureConfig(experts=4, top_k=2, ffn_hidden_size=24),
        rotary=RotaryConfig(rule="telechat_ntk", original_length=64, training_length=64),
    ),
    "deepseek": ModelConfig(
        **{**SMALL, "head_dim": 12},
        kv_heads=4,
        mtp_layers=1,
        tied_embeddings=True,
        init_std=0.3,
        mixture=MixtureConfig(
            experts=4,
            top_k=2,
            ffn_hidden_size=24,
            shared_experts=2,
            dense_layers=1,
            scoring="sigmoid",
            scale=2.8,
            bias=True,
        ),
        latent=LatentConfig(query_rank=20, key_value_rank=12, rope_head_dim=4, value_head_dim=6),
    ),
    "deepseek with biases": ModelConfig(
        **SMALL,
        kv_heads=4,
        qkv_bias=True,
        attention_output_bias=True,
        mixture=MixtureConfig(experts=4, top_k=2, ffn_hidden_size=24),
        latent=LatentConfig(query_rank=20, key_value_rank=12, rope_head_dim=4, value_head_dim=6),
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_a_written_configuration_reads_back_the_same(name):
    layout = next(layout for layout in LAYOUTS if layout.name == name.split()[0])
    variant = Variant(layout.prefix)
    names = set(layout.published_shapes(HELD[name], variant))
    written = PublishedConfig("config.json", layout.write_config(HELD[name]))
    assert layout.recognises(written, names)
    read = layout.read_config(written, names)
    assert read.logit_multiplier == pytest.approx(HELD[name].logit_multiplier)
    assert read.model_copy(update={"logit_multiplier": HELD[name].logit_multiplier}) == HELD[name]


def native_folder(config, tmp_path):
    folder = tmp_path / "trained"
    folder.mkdir()
    decoder = learner(config).eval()
    write_native(folder, config, None, HeldTensors(decoder.state_dict()), 10**9)
    return folder, decoder


@pytest.mark.parametrize("name", HELD)
def test_a_trained_model_is_exported_in_the_layout_that_holds_it(name, tmp_path):
    folder, decoder = native_folder(HELD[name], tmp_path)
    expected = "teleflm" if name == "telechat52" else name.split()[0]
    assert export_model(folder, tmp_path / "out").layout == expected
    ids = torch.arange(30)[None]
    torch.testing.assert_close(zili.load(tmp_path / "out")(ids), decoder(ids), atol=1e-6, rtol=0)


def test_a_layout_that_would_lose_something_is_refused(tmp_path):
    folder, _ = native_folder(HELD["telechat2"], tmp_path)
    with pytest.raises(CheckpointError, match=r"telechat52 layout cannot hold this model: "):
        export_model(folder, tmp_path / "out", layout="telechat52")
    with pytest.raises(ConfigError, match="no layout 'ggml'; choose auto, telechat2, llama, telechat3"):
        export_model(folder, tmp_path / "out", layout="ggml")
    odd = HELD["llama"].model_copy(update={"qkv_bias": True, "rotary": HELD["telechat2"].rotary})
    (tmp_path / "odd").mkdir()
    folder, _ = native_folder(odd, tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"no published layout can hold this model \(telechat2: "):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(publish, tmp_path):
    from zili.cli.import_export import export, import_

    app = Typer()
    app.command("import")(import_)
    app.command("export")(export)
    folder = publish("telechat2")
    run = CliRunner().invoke(app, ["import", str(folder), "--to", str(tmp_path / "zili")])
    assert run.exit_code == 0, run.output
    assert "telechat2 layout" in run.output
    back = ["export", str(tmp_path / "zili"), "--to", str(tmp_path / "back"), "--as", "telechat2"]
    assert CliRunner().invoke(app, back).exit_code == 0
    assert stored(tmp_path / "back") == stored(folder)
    again = CliRunner().invoke(app, back)
    assert isinstance(again.exception, CheckpointError)
    assert "exists already" in str(again.exception)


def test_a_layer_of_multi_token_prediction_is_read_and_its_copies_are_left_out(publish, tmp_path):
    def copies(tensors):
        tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()

    folder = publish("deepseek", edit=copies)
    before, after = stored(folder), stored(there_and_back(folder, tmp_path))
    assert before.keys() - after.keys() == {
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight",
    }
    assert after == {name: before[name] for name in after}
    tensors, model = load_file(folder / "model.safetensors"), learner(open_model(folder).config).bfloat16()
    fill_from([model], open_model(folder))
    assert torch.equal(model.next_tokens.projection.weight, tensors["model.layers.2.eh_proj.weight"])
    assert torch.equal(model.next_tokens.embedding_norm.weight, tensors["model.layers.2.enorm.weight"])
    stack = model.next_tokens.block.feed_forward.experts.down
    assert torch.equal(stack[3], tensors["model.layers.2.mlp.experts.3.down_proj.weight"])


def test_a_layer_of_multi_token_prediction_that_was_dropped_is_not_missed(publish, tmp_path):
    """transformers leaves it out when it saves, and keeps the key."""

    def drop(tensors):
        for name in [name for name in tensors if ".layers.2." in name]:
            del tensors[name]

    folder = publish("deepseek", edit=drop)
    assert open_model(folder).config.mtp_layers == 0
    back = there_and_back(folder, tmp_path)
    assert stored(back) == stored(folder)
    assert configs(back)[0]["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("native", [False, True])
def test_router_biases_stay_in_fp32(publish, native, tmp_path):
    def fine(tensors):
        for name in tensors:
            if name.endswith("e_score_correction_bias"):
                tensors[name] = torch.tensor([0.1, 0.2, 0.3, 0.4]) + 1e-5

    folder = publish("deepseek", edit=fine)
    if native:
        import_model(folder, tmp_path / "zili", dtype=torch.bfloat16)
        folder = tmp_path / "zili"
    router = zili.load(folder, dtype=torch.bfloat16).layers[1].feed_forward.router
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.expert_bias, torch.tensor([0.1, 0.2, 0.3, 0.4]) + 1e-5)


def test_a_checkpoint_is_exported_as_what_it_started_from(publish, tmp_path):
    """A run that copied the imported folder's model.json and tokenizer gives back its config.json."""
    folder = publish("telechat2", torch.float32, changes={"of_no_meaning_to_us": 7})
    write_tokenizer(folder)
    import_model(folder, tmp_path / "zili")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    trained = zili.load(folder)
    with torch.no_grad():
        trained.norm.weight.mul_(2.0)
    write_checkpoint(checkpoint, trained)
    for name in ("model.json", "tokenizer.json"):
        (tmp_path / "run" / name).write_bytes((tmp_path / "zili" / name).read_bytes())
    for place in (checkpoint, tmp_path / "run"):
        assert zili.load(place, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    assert export_model(checkpoint, tmp_path / "out").layout == "telechat2"
    assert configs(tmp_path / "out")[0]["of_no_meaning_to_us"] == 7
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    before, after = stored(folder), stored(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {"transformer.ln_f.weight"}


def test_transformers_loads_an_exported_mixture(tmp_path):
    # Its norms of low rank have an eps of their own, 1e-6, whatever the configuration says.
    config = HELD["deepseek"].model_copy(update={"mtp_layers": 0, "tied_embeddings": False, "norm_eps": 1e-6})
    folder, decoder = native_folder(config, tmp_path)
    export_model(folder, tmp_path / "out")
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), torch.arange(40)[None]
    expected = decoder(ids)
    assert expected.abs().max() > 1
    torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=0)
