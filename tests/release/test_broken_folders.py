"""Folders that cannot be read: one clear error each, with the file and the way out; nothing left behind."""

import json
import os
import shutil

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import zili
from zili.data.tokenizer import Tokenizer
from zili.errors import CheckpointError, ConfigError, DataError
from zili.release import export_model, import_model
from zili.release.companions import tokenizer_of
from zili.release.tensors import open_tensors
from zili.serving.generate.engine import Engine
from zili.serving.generate.generation import Ask, generate
from zili.serving.model_folder import open_folder


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match):
        zili.load(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_group": 8}, r"config.json: n_group = 8 is not supported, only 0 or 1 is"),
        ({"topk_group": 4}, r"topk_group = 4 is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, r"rope_scaling = .*yarn.* is not supported"),
        ({"scoring_func": "tanh"}, r"scoring_func = 'tanh' is not supported, only 'sigmoid' or 'softmax'"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq = 2 is not supported"),
        ({"topk_method": "group_limited_greedy"}, r"topk_method = 'group_limited_greedy' is not supported"),
        ({"num_nextn_predict_layers": 2}, r"num_nextn_predict_layers = 2 is not supported"),
        ({"num_nextn_predict_layers": 0}, r"30 unexpected of 41 tensors"),
        ({"q_lora_rank": None}, r"q_lora_rank is null, so queries come from the hidden state itself"),
        ({"attention_bias": True}, r"9 missing of 80 tensors .*q_a_proj.bias"),
        ({"model_type": "deepseek_v2"}, r"n_routed_experts = 4, a mixture of experts of no layout .*dense checkpoint"),
        ({"n_routed_experts": 3}, r"6 unexpected of 65 tensors"),
    ],
)
def test_mixtures_that_do_not_fit(publish, changes, match):
    refused(publish("deepseek", changes=changes), match)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("local_experts.3.down_proj.bias", r"1 biases in experts or routers .*h.1.mlp.local_experts.3.down_proj.bias"),
        ("router.bias", r"1 biases in experts or routers .*remove them"),
    ],
)
def test_biases_of_experts_are_not_dropped(publish, name, match):
    def edit(tensors):
        tensors[f"transformer.h.1.mlp.{name}"] = torch.zeros(32)

    refused(publish("telechat2 with experts", edit=edit), match)


@pytest.mark.parametrize("spelling", ["num_experts", "num_local_experts", "n_routed_experts"])
@pytest.mark.parametrize("choice", ["num_experts_per_tok", "moe_topk", "top_k"])
def test_a_mixture_of_the_second_generation_in_several_spellings(publish, spelling, choice):
    changes = {"num_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None, "ffn_hidden_size": 24}
    config = zili.load(publish("telechat2 with experts", changes={**changes, spelling: 4, choice: 2})).config
    assert (config.mixture.experts, config.mixture.top_k, config.mixture.ffn_hidden_size) == (4, 2, 24)
    assert (config.mixture.scoring, config.mixture.normalize, config.mixture.shared_experts) == ("softmax", True, 0)


def test_a_mixture_that_does_not_say_its_size(publish):
    folder = publish("telechat2 with experts", changes={"num_experts": None})
    refused(folder, r"none of the keys num_experts, num_local_experts, n_routed_experts is there")


@pytest.mark.parametrize(
    ("copy", "match"), [("embed_tokens", "embed_tokens.weight"), ("shared_head.head", "lm_head.weight")]
)
def test_the_copies_in_the_layer_of_multi_token_prediction_must_be_copies(publish, copy, match):
    def edit(tensors):
        tensors[f"model.layers.2.{copy}.weight"] = torch.zeros(72, 32, dtype=torch.bfloat16)

    refused(publish("deepseek", edit=edit), rf"layers.2.{copy}.weight should repeat (model.)?{match} and does not")


def test_nothing_there(tmp_path):
    refused(tmp_path / "absent", r"absent is not a folder")
    with pytest.raises(CheckpointError, match=r"not a Hugging Face model folder: it has no config.json"):
        import_model(tmp_path, tmp_path / "out")


def test_no_weights(publish):
    folder = publish("llama")
    (folder / "model.safetensors").unlink()
    refused(folder, r"has no weights: looked for model.safetensors, pytorch_model.bin")


def test_a_missing_shard(publish, tmp_path):
    import_model(publish("llama"), tmp_path / "zili", max_shard_bytes=8000)
    export_model(tmp_path / "zili", tmp_path / "back", max_shard_bytes=8000)
    shard = sorted((tmp_path / "back").glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "back", rf"{shard.name} is missing, one of \d+ shards; fetch it")


def test_an_index_that_promises_too_much(publish, tmp_path):
    import_model(publish("llama"), tmp_path / "zili", max_shard_bytes=8000)
    export_model(tmp_path / "zili", tmp_path / "back", max_shard_bytes=8000)
    path = tmp_path / "back" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.phantom"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    refused(tmp_path / "back", r"lacks 'model.phantom'")
    path.write_text("{}")
    refused(tmp_path / "back", r"index.json has no 'weight_map'")


@pytest.mark.parametrize("kept", [4, 300, -1])
def test_truncated_safetensors(publish, kept):
    path = publish("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(path.parent, r"model.safetensors \(\d+ bytes\) is damaged or cut short")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0, 30, 0.5, 0.99])
def test_truncated_pickle(publish, zipped, kept):
    folder = publish("llama")
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path, _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if kept < 1 else kept])
    refused(folder, r"pytorch_model.bin \(\d+ bytes\) is damaged or cut short")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code(publish, monkeypatch, tmp_path, zipped):
    monkeypatch.chdir(tmp_path)
    folder = publish("llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "extra": Trap()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(folder, r"pytorch_model.bin would run code if loaded, refused: .*mkdir")
    assert not (tmp_path / "trapped").exists()
    torch.save([1, 2], folder / "pytorch_model.bin")
    refused(folder, r"not a table of tensors")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model_type": "gemma"},
            r"config.json: unknown architecture \(model_type 'gemma'.*known layouts: telechat2",
        ),
        ({"num_hidden_layers": 3}, r"9 missing of 30 tensors .*model.layers.2.* and 5 more; "),
        ({"num_hidden_layers": 1}, r"9 unexpected of 12 tensors"),
        (
            {"intermediate_size": 48},
            r"6 tensors of another shape .*gate_proj.weight is \(40, 32\), not \(48, 32\)",
        ),
        ({"rms_norm_eps": None}, r"config.json: key 'rms_norm_eps' is missing"),
        ({"hidden_act": "gelu"}, r"config.json: hidden_act = 'gelu' is not supported, only 'silu' is"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            r"rope_type = 'longrope' is not supported, only 'default'",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, r"key 'factor' is missing"),
        ({"embedding_size": 16}, r"embedding_size = 16 is not supported, only 32 is"),
        ({"num_key_value_heads": 3}, r"describes no model of ours: .*not a multiple of kv_heads \(3\)"),
        ({"num_experts": 4}, r"num_experts = 4, a mixture of experts"),
        ({"tie_word_embeddings": True}, r"ties the head .*lm_head.weight is not model.embed_tokens.weight"),
    ],
)
def test_configurations_that_do_not_fit(publish, changes, match):
    refused(publish("llama", changes=changes), match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"apply_residual_connection_post_layernorm": True},
            r"apply_residual_connection_post_layernorm = True",
        ),
        ({"embed_layernorm": True}, r"embed_layernorm = True is not supported"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            r"rope_scaling = .*dynamic.* is not supported",
        ),
        ({"training_seqlen": None}, r"key 'training_seqlen' is missing"),
    ],
)
def test_telechat_configurations_that_do_not_fit(publish, changes, match):
    refused(publish("telechat2", changes=changes), match)


def test_a_long_context_telechat2_brings_its_base(publish):
    scaling = {"factor": 1.0, "rope_type": "dynamic"}
    changes = {"rope_theta": 1e6, "rope_scaling": scaling, "base_seqlen": 32768, "training_seqlen": 32768}
    assert zili.load(publish("telechat2", changes=changes)).config.rotary.base == 1e6


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_config(publish, text):
    folder = publish("llama")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, r"config.json (is not valid JSON|holds a JSON list)")


def test_a_changed_zili_folder(publish, tmp_path):
    import_model(publish("llama"), tmp_path / "zili")
    path = tmp_path / "zili" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(tmp_path / "zili", r"model.safetensors is not the file that was written \(sha256\)")
    content = json.loads((tmp_path / "zili" / "model.json").read_text())
    (tmp_path / "zili" / "model.json").write_text(json.dumps({**content, "version": 9}))
    refused(tmp_path / "zili", r"version 9; this Zili reads 'zili-model' version 1")


def test_a_failure_leaves_nothing_behind(publish, tmp_path, monkeypatch):
    from zili.release import native

    def full(*_):
        raise OSError(28, "No space left on device")

    folder = publish("llama")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(native, "write_model_file", full)
    with pytest.raises(OSError, match="No space left"):
        import_model(folder, tmp_path / "zili")
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_folder_is_not_written_over(publish, tmp_path):
    folder = publish("llama")
    (tmp_path / "zili").mkdir()
    import_model(folder, tmp_path / "zili")  # empty: fine
    with pytest.raises(CheckpointError, match=r"zili exists already; name another folder or remove it"):
        import_model(folder, tmp_path / "zili")


def test_extra_tensors_are_not_silently_dropped(publish):
    def widen(tensors):
        tensors["model.embedding_hidden_mapping_in.weight"] = torch.zeros(32, 16)

    refused(publish("llama", edit=widen), r"1 unexpected of 21 tensors .*embedding_hidden_mapping_in")


def test_safetensors_of_an_unknown_dtype(publish):
    folder = publish("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, r"'model.norm.weight' has dtype F8_E4M3")


@pytest.mark.parametrize("home", [3, None, ["model.safetensors"], {}, "../model.safetensors", ""])
def test_an_index_that_names_no_file(publish, home):
    folder = publish("llama")
    index = {"weight_map": {"lm_head.weight": home, "model.norm.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "'lm_head.weight' is in .*, which is no file of this folder")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 4965799096\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "tokenizer.model", "m.gguf"]
)
def test_pointers_in_place_of_files(publish, tmp_path, name):
    folder = publish("llama")
    if name.endswith((".bin", ".gguf")):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}" if name.endswith(".bin") else POINTER)
        if name.endswith(".gguf"):
            (folder / "config.json").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises((CheckpointError, DataError), match=rf"{name}.*Git LFS pointer.*git lfs pull"):
        if name.startswith("tokenizer"):
            tokenizer_of(folder)
        else:
            open_tensors(folder) if name.endswith(".bin") else zili.load(folder)


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_was_added_without_weights(publish, special):
    """As transformers opens it: the token is the tokenizer's, and no text of ours becomes it."""
    size = 300

    def widen(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:1].repeat(size, 1)

    folder = publish("llama", changes={"vocab_size": size}, edit=widen)
    tokenizer = tokenizers.Tokenizer.from_str(Tokenizer.train(["a text of words"] * 4, 270).definition)
    fill = [f"<fill{number}>" for number in range(size - tokenizer.get_vocab_size())]
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=True) for text in fill])
    tokenizer.add_tokens([tokenizers.AddedToken("[PAD]", special=special)])
    tokenizer.save(str(folder / "tokenizer.json"))
    opened = open_folder(folder)
    assert opened.tokenizer.vocab_size == size + 1
    ids = opened.tokenizer.encode("a [PAD] b").tolist()
    assert max(ids) < size and opened.tokenizer.decode(ids) == "a [PAD] b"
    with Engine(opened.model, slots=1, context=32) as engine, pytest.raises(ConfigError, match=f"token {size}"):
        engine.submit(Ask([1, size], 2))
    with pytest.raises(ConfigError, match=f"token {size}"):
        generate(opened.model, [1, size], max_new_tokens=2)
    tokenizer.add_tokens([tokenizers.AddedToken("<more>", special=True)])
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"]["words"] = size + 2
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="do not belong together"):
        open_folder(folder)


def test_experts_that_the_weights_have_no_room_for(publish):
    """Names of a billion took all memory there is; layers are bounded by the shape itself."""
    refused(publish("deepseek", changes={"n_routed_experts": 10**9}), "counts 1,000,000,000 experts")
