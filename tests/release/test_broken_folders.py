"""Folders that cannot be read: one clear error each, with the file and the way out; nothing left behind."""

import json
import os

import pytest
import torch
from published_folders import golden_folder
from safetensors.torch import load_file, save_file

import zili
from zili.errors import CheckpointError
from zili.release import export_model, import_model


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match):
        zili.load(folder)


def test_a_mixture_of_experts():
    refused(golden_folder("telechat3-moe"), r"config.json: n_routed_experts = 8, a mixture of experts; .*dense")


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
