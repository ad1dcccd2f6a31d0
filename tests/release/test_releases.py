"""Release folders: what others compute from them, what is beside the weights, and what `verify` finds."""

import json
import shutil
import subprocess

import pytest
import torch
from published_folders import PUBLISHED, golden_folder, write_checkpoint, write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import zili
from zili.checksums import read_sums, sha256, verify_sums, write_sums
from zili.config.mixture import MixtureConfig
from zili.config.model import ModelConfig, RotaryConfig
from zili.config.presets import load_preset, preset_names
from zili.errors import CheckpointError
from zili.objectives import learner
from zili.release import export_model, import_model
from zili.release.opening import LAYOUTS
from zili.release.record import read_release
from zili.release.verifying import verify_release
from zili.serving.generate.generation import Sampling, generate

SMALL = {"vocab_size": 300, "hidden_size": 32, "layers": 3, "heads": 4, "head_dim": 8, "ffn_hidden_size": 48}
SMALL |= {"max_length": 128, "init_std": 0.3}
NTK = {"rule": "telechat_ntk", "half_tables": False}
BIASED = {"attention_output_bias": True, "ffn_down_bias": True}
MODELS = {
    "telechat2": ModelConfig(
        **SMALL, **BIASED, kv_heads=2, rotary=RotaryConfig(**NTK, original_length=128, training_length=128)
    ),
    # alpha is 3 up to the training length already: vLLM, which takes one base, must be told that one.
    "telechat2 trained longer": ModelConfig(
        **SMALL, **BIASED, kv_heads=4, rotary=RotaryConfig(**NTK, original_length=64, training_length=128)
    ),
    "telechat3": ModelConfig(
        **SMALL, kv_heads=2, rotary=RotaryConfig(rule="telechat3_yarn", base=1e4, factor=4.0, original_length=32)
    ),
    "mup": ModelConfig(
        **SMALL,
        kv_heads=4,
        tied_embeddings=True,
        embedding_multiplier=2.5,
        logit_multiplier=1 / 7,
        rotary=RotaryConfig(rule="tele_flm_ntk", original_length=128),
    ),
    "plain, one bias": ModelConfig(**SMALL, kv_heads=1, mtp_layers=1, qkv_bias=True),
    "experts": ModelConfig(
        **SMALL,
        attention_output_bias=True,
        kv_heads=2,
        mixture=MixtureConfig(experts=4, top_k=2, ffn_hidden_size=24),
        rotary=RotaryConfig(**NTK, original_length=128, training_length=128),
    ),
}
CAN = [
    *((name, layout) for name in MODELS for layout in ("telechat2", "telechat3", "llama")),
]
CANNOT = {
    ("telechat3", "telechat2"): "rotary.rule = 'telechat3_yarn'",
    ("plain, one bias", "telechat2"): "qkv_bias",
    ("experts", "llama"): "mixture",
    ("experts", "telechat3"): "mixture",
}


@pytest.fixture
def run(tmp_path):
    """A run's checkpoint of a random model whose every weight matters, norms and biases too."""

    def make(config, dtype=torch.float32):
        torch.manual_seed(1)
        decoder = learner(config).eval()
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if parameter.ndim == 1:
                    parameter.normal_(0.0, 0.3).add_("norm" in name)
        write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003", decoder)
        (tmp_path / "run" / "tokenizer").mkdir()
        write_tokenizer(tmp_path / "run" / "tokenizer")
        return tmp_path / "run", decoder

    return make


def released(run, tmp_path, name, layout, **options):
    folder, decoder = run(MODELS[name])
    return export_model(folder, tmp_path / "out", layout=layout, **options), tmp_path / "out", decoder


@pytest.mark.parametrize(("name", "layout"), [pair for pair in CAN if pair not in CANNOT])
def test_transformers_gives_the_same_log_probabilities_and_greedy_ids(run, tmp_path, name, layout):
    release, folder, decoder = released(run, tmp_path, name, layout)
    assert release.difference <= 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    ids = torch.randint(300, (2, 100), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert (theirs(ids).logits.log_softmax(-1) - decoder(ids).log_softmax(-1)).abs().max() <= 1e-4
    prompt = ids[:1, :60]
    greedy = theirs.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours = generate(decoder, prompt[0].tolist(), max_new_tokens=24, sampling=Sampling(temperature=0))
    assert greedy[0, 60:].tolist() == list(ours)


@pytest.mark.parametrize(("name", "layout"), CANNOT)
def test_what_a_layout_cannot_say_is_refused(run, tmp_path, name, layout):
    with pytest.raises(CheckpointError, match=CANNOT[name, layout]):
        released(run, tmp_path, name, layout)
    assert not (tmp_path / "out").exists()


def test_batches_with_padding_on_the_left_are_answered_alike(run, tmp_path):
    """transformers pads so; a mask must keep padding out, and the cache must keep it out too."""
    _, folder, _ = released(run, tmp_path, "telechat2", "telechat2")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    prompts = [torch.arange(5, 17), torch.arange(40, 60)]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [model.generate(prompt[None], **settings)[0, len(prompt) :].tolist() for prompt in prompts]
    padded = torch.stack([torch.cat((torch.zeros(8, dtype=torch.long), prompts[0])), prompts[1]])
    mask = torch.ones_like(padded)
    mask[0, :8] = 0
    together = model.generate(padded, attention_mask=mask, **settings)
    assert together[:, 20:].tolist() == alone


def test_the_whole_folder_is_there(run, tmp_path):
    release, folder, _ = released(run, tmp_path, "telechat2 trained longer", "telechat2", max_shard_bytes=50_000)
    names = {file.name for file in folder.iterdir()}
    assert names > {
        *("config.json", "generation_config.json", "configuration.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "README.md", "release.json", "SHA256SUMS"),
        *("configuration_telechat2.py", "modeling_telechat2.py"),
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["TeleChat2ForCausalLM"]
    assert config["rope_theta"] == pytest.approx(10_000 * 3 ** (8 / 6))
    assert config["base_seqlen"] == config["training_seqlen"] == config["max_position_embeddings"] == 128
    assert config["eos_token_id"] == json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).num_hidden_layers == 3
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).encode("abz") == [1, 2, 0]
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder, check=False).returncode == 0
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlanguage:\n- zh\n- en\n")
    for text in ("rotary base 43267", "sha256sum -c", "trust_remote_code=True", "局限"):
        assert text in card
    assert release.provenance["kind"] == "run" and release.provenance["step"] == 3
    assert str(tmp_path) not in card + (folder / "release.json").read_text()


def test_a_release_verifies_against_what_it_was_made_from(run, tmp_path):
    _, folder, _ = released(run, tmp_path, "telechat2", "llama", dtype=torch.bfloat16)
    found = {finding.what.split()[0]: finding.detail for finding in verify_release(folder, against=tmp_path / "run")}
    assert set(found) == {"files", "tokenizer", "log-probabilities", "source", "transformers"}
    assert found["source"].endswith("likeliest ids equal")
    # Of another run, though of the same shape, it was not made.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    other = learner(MODELS["telechat2"])
    other.init_weights(5)
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003", other)
    with pytest.raises(CheckpointError, match=r"source: .* nats"):
        verify_release(folder, against=tmp_path / "run")


def seal(folder):
    """SHA256SUMS of what is there now, as whoever changed it on purpose would write it."""
    files = [file for file in folder.iterdir() if file.name != "SHA256SUMS"]
    write_sums(folder, {file.name: sha256(file) for file in files})


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)


def change_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_tokenizer(folder):
    definition = json.loads((folder / "tokenizer.json").read_text())
    letters = definition["model"]["vocab"]
    letters["e"], letters["f"] = letters["f"], letters["e"]
    (folder / "tokenizer.json").write_text(json.dumps(definition))


def change_base(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 4965799096\n"


def leave_a_pickle(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


@pytest.mark.parametrize(
    ("damage", "sealed", "said"),
    [
        (lambda folder: flip(folder / "model.safetensors"), False, "model.safetensors is damaged"),
        (lambda folder: (folder / "config.json").unlink(), False, r"config.json cannot be read"),
        (leave_a_pickle, False, r"pytorch_model.bin is not listed in SHA256SUMS, and whoever opens"),
        (lambda folder: (folder / "modeling_llama.py").write_text(""), False, r"modeling_llama.py is not listed"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), False, "is not listed"),
        (lambda folder: (folder / "model.safetensors").write_text(POINTER), False, "is a Git LFS pointer"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), False, "SHA256SUMS cannot be read"),
        (lambda folder: (folder / "release.json").unlink(), False, "no release of `zili export`"),
        (lambda folder: (folder / "release.json").write_text("{}"), True, "format None"),
        (change_weight, True, r"log-probabilities: .* nats"),
        (change_base, True, r"log-probabilities: .* nats"),
        (change_tokenizer, True, "its tokenizer gives other ids"),
        (lambda folder: (folder / "tokenizer.json").unlink(), True, "and there is none now"),
    ],
)
def test_any_mismatch_fails(run, tmp_path, damage, sealed, said):
    _, folder, _ = released(run, tmp_path, "telechat2", "llama")
    damage(folder)
    if sealed:
        seal(folder)
    with pytest.raises(CheckpointError, match=said):
        verify_release(folder)


def test_what_git_hubs_and_desktops_add_is_said_and_no_failure(run, tmp_path):
    _, folder, _ = released(run, tmp_path, "telechat2", "llama")
    added = [".gitattributes", ".DS_Store", "._config.json", "Thumbs.db", "desktop.ini", "notes.txt", ".msc"]
    for name in added:
        (folder / name).write_text("*.safetensors filter=lfs\n")
    for name in (".git", ".cache"):
        (folder / name).mkdir()
    for name in ("config.json", "README.md"):
        (folder / name).write_bytes((folder / name).read_bytes().replace(b"\n", b"\r\n"))
    found = {finding.what: finding.detail for finding in verify_release(folder, transformers=False)}
    assert ".DS_Store" in found["not listed"] and "and 1 more" in found["not listed"]
    assert "README.md, config.json" in found["line ends"]
    (folder / "README.md").write_bytes((folder / "README.md").read_bytes() + b"\r\n")
    with pytest.raises(CheckpointError, match=r"README.md is damaged"):
        verify_release(folder)


def test_code_that_is_not_ours_is_not_run(run, tmp_path):
    _, folder, _ = released(run, tmp_path, "telechat2", "telechat2")
    witness = tmp_path / "it ran"
    (folder / "modeling_telechat2.py").write_text(f"open({str(witness)!r}, 'w')\n")
    seal(folder)
    verify_release(folder)
    with pytest.raises(CheckpointError, match="not Zili's"):
        verify_release(folder, transformers=True)
    assert not witness.exists()


def test_what_transformers_cannot_load_is_said_whatever_it_raises(run, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    _, folder, _ = released(run, tmp_path, "telechat2", "llama")

    def strict(*_, **__):
        raise RuntimeError("64 is not a multiple of 3 heads")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", strict)
    with pytest.raises(CheckpointError, match=r"cannot load .*64 is not a multiple"):
        verify_release(folder)


def test_a_tokenizer_of_another_model_is_not_released(run, tmp_path):
    from zili.data.tokenizer import Tokenizer

    folder, _ = run(MODELS["telechat2"].model_copy(update={"vocab_size": 270}))
    shutil.rmtree(folder / "tokenizer")
    Tokenizer.train(["今天的天气很好" * 30], 300).save(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="do not belong together"):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", preset_names())
def test_every_dense_preset_has_a_llama_equivalent(name):
    from zili.release.equivalent import llama_equivalent
    from zili.release.tensors import HeldTensors

    config = ModelConfig(**load_preset(name))
    if config.mixture or config.latent:
        pytest.skip("experts are none of Llama's")
    said = llama_equivalent(config, HeldTensors({"embedding.weight": torch.zeros(1)}))
    llama = next(layout for layout in LAYOUTS if layout.name == "llama")
    assert not llama.unsupported(said.config)


def test_a_published_folder_becomes_a_complete_one(tmp_path):
    """TeleChat2's own files: an explicit base, the name vLLM knows, code that runs, tables rounded as published."""
    source = golden_folder("telechat2-gqa")
    golden = load_file(source / "golden.safetensors")
    import_model(source, tmp_path / "zili")
    (tmp_path / "zili" / "modeling_telechat.py").write_text("raise SystemExit('the code it was published with')")
    for layout, allowed in (("telechat2", 1e-4), ("llama", 0.1)):
        release = export_model(tmp_path / "zili", tmp_path / layout, layout=layout)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / layout, trust_remote_code=True, dtype=torch.float32)
        with torch.no_grad():
            found = model(golden["input_ids"]).logits
        assert (found - golden["logits"]).abs().max() <= allowed
        assert ("fp16" in " ".join(release.notes)) == (layout == "llama")
        assert (release.difference > 1e-6) == (layout == "llama")
        verify_release(tmp_path / layout, against=tmp_path / "zili", transformers=True)
        assert not (tmp_path / layout / "modeling_telechat.py").exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_exported_as_it_came_verifies(publish, tmp_path, name):
    import_model(publish(name), tmp_path / "zili")
    export_model(tmp_path / "zili", tmp_path / "back")
    sums = read_sums(tmp_path / "back")
    assert sums
    verify_sums(tmp_path / "back", sums)
    assert len(verify_release(tmp_path / "back", transformers=False)) == 3


def apart(folder, decoder, rows):
    """Largest difference of a log-probability of the ids in `rows`, both models loaded whole."""
    loaded, found = zili.load(folder), []
    for row in map(torch.tensor, rows):
        with torch.no_grad():
            difference = loaded(row[None]).log_softmax(-1) - decoder(row[None]).log_softmax(-1)
        found.append(float(difference[0, :-1].gather(1, row[1:, None]).abs().max()))
    return max(found)


@pytest.mark.parametrize("layout", ["telechat2", "llama"])
def test_a_rounded_release_is_compared_with_what_was_trained(run, tmp_path, layout):
    from zili.cli.app import app

    folder, decoder = run(MODELS["telechat2"])
    out = tmp_path / "out"
    found = CliRunner().invoke(
        app, ["export", str(folder), "--to", str(out), "--as", layout, "--dtype", "bfloat16"], catch_exceptions=False
    )
    release = read_release(out)
    truth = apart(out, decoder, release.probe.ids)
    assert truth > 1e-3, "rounding shows"
    assert release.difference == pytest.approx(truth, rel=1e-2)
    assert release.but_for_rounding <= 1e-4
    assert f"within {release.difference:.2g} nats of {folder}" in found.output
    assert f"{release.difference:.2g} nats" in (out / "README.md").read_text()
    details = {one.what: one.detail for one in verify_release(out, against=folder, transformers=False)}
    assert f"({release.difference:.2g} nats from the source's" in details["log-probabilities"]
    assert f"as it is stored, within {release.difference:.2g} nats" in details["source"]
    # What rounding did is no room for another model: this one is nearer to it than the rounded one.
    with torch.no_grad():
        decoder.head_weight.mul_(1 + 2**-9)
    assert apart(out, decoder, release.probe.ids) < 1.5 * truth
    shutil.rmtree(folder / "checkpoints")
    write_checkpoint(folder / "checkpoints" / "step-00000004", decoder)
    with pytest.raises(CheckpointError, match="source: they differ"):
        verify_release(out, against=folder, transformers=False)


def test_a_release_from_before_rounding_was_told_apart_verifies(run, tmp_path):
    _, folder, _ = released(run, tmp_path, "telechat2", "telechat2", dtype=torch.bfloat16)
    record = json.loads((folder / "release.json").read_text())
    record["difference_from_source"] = record.pop("difference_but_for_rounding")
    (folder / "release.json").write_text(json.dumps(record))
    seal(folder)
    first, *_ = [one for one in verify_release(folder, transformers=False) if one.what == "log-probabilities"]
    assert "source" not in first.detail
    verify_release(folder, against=tmp_path / "run", transformers=False)


def test_the_command_says_what_held(run, tmp_path):
    from zili.cli.app import app

    _, folder, _ = released(run, tmp_path, "telechat2", "llama")
    found = CliRunner().invoke(app, ["verify", str(folder)])
    assert found.exit_code == 0, found.output
    assert found.output.splitlines()[-1] == f"{folder} holds"
    assert zili.load(folder).config.layers == 3
