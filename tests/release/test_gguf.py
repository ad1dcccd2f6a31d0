"""GGUF files in and out. llama.cpp itself is asked by `make test-interop`."""

import json
import shutil
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_folders import write_checkpoint, write_tokenizer

import zili
from zili.config.mixture import MixtureConfig
from zili.config.model import ModelConfig, RotaryConfig
from zili.data.sentencepiece import Kind, Piece, definition
from zili.data.tokenizer import Tokenizer
from zili.errors import CheckpointError
from zili.objectives import learner
from zili.release import export_model, import_model
from zili.release.companions import tokenizer_of
from zili.release.gguf.file import open_gguf
from zili.release.gguf.tokenizer import read_tokenizer
from zili.release.verifying import verify_release
from zili.serving.model_folder import demo_file, open_folder

gguf = pytest.importorskip("gguf")
SMALL = {"vocab_size": 320, "hidden_size": 64, "layers": 2, "heads": 4, "head_dim": 16, "ffn_hidden_size": 96}
SMALL |= {"max_length": 128, "init_std": 0.2}
MODELS = {
    "telechat2": ModelConfig(
        **SMALL,
        kv_heads=2,
        attention_output_bias=True,
        ffn_down_bias=True,
        rotary=RotaryConfig(rule="telechat_ntk", original_length=64, training_length=128, half_tables=False),
    ),
    "tied": ModelConfig(**SMALL, kv_heads=1, tied_embeddings=True, rotary=RotaryConfig(rule="linear", factor=2.0)),
    "telechat3": ModelConfig(
        **SMALL, kv_heads=4, rotary=RotaryConfig(rule="telechat3_yarn", factor=4.0, original_length=32)
    ),
}
TEXT = "The model 模型 trains 12345 steps.\n\n    return self.x  # 你好 <_user>"


def run_of(tmp_path, config, tokenizer=None):
    torch.manual_seed(2)
    decoder = learner(config).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0, 0.3).add_("norm" in name)
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001", decoder)
    (tmp_path / "run" / "tokenizer").mkdir()
    (tokenizer or Tokenizer.train([TEXT] * 9, 300)).save(tmp_path / "run" / "tokenizer")
    return tmp_path / "run", decoder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_file_says_what_its_source_does(tmp_path, name, dtype):
    folder, decoder = run_of(tmp_path, MODELS[name])
    release = export_model(folder, tmp_path / "out", layout="gguf", dtype=dtype)
    assert release.layout == "gguf" and release.but_for_rounding <= 1e-4
    assert (release.difference <= 1e-4) == (dtype is None)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("model.gguf", "README.md", "release.json", "SHA256SUMS")
    }
    opened = open_folder(tmp_path / "out")
    assert opened.tokenizer.encode(TEXT).tolist() == Tokenizer.from_folder(folder / "tokenizer").encode(TEXT).tolist()
    ids = torch.randint(320, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (opened.model(ids).log_softmax(-1) - decoder(ids).log_softmax(-1)).abs().max()
    assert difference <= (1e-4 if dtype is None else 0.3)
    assert len(verify_release(tmp_path / "out", against=folder)) == 4


def test_the_rows_of_query_and_key_are_llama_cpp_s(tmp_path):
    """As its converter does it: `w.reshape(heads, 2, d / 2, D).swapaxes(1, 2)`, written here with numpy."""
    folder, decoder = run_of(tmp_path, MODELS["telechat2"])
    export_model(folder, tmp_path / "out", layout="gguf")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    for part, name, heads in (("attn_q", "query", 4), ("attn_k", "key", 2)):
        ours = getattr(decoder.layers[1].attention, name).weight.detach().numpy()
        expected = ours.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(ours.shape)
        assert (stored[f"blk.1.{part}.weight"] == expected).all()
    assert "blk.0.attn_q.bias" in stored and "blk.0.ffn_gate.bias" in stored


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_K"])
def test_quantised_tensors_are_computed_back(tmp_path, kind):
    """Bytes of a file as llama.cpp's own quantiser leaves them, of a matrix whose every block is known."""
    folder, _ = run_of(tmp_path, MODELS["tied"].model_copy(update={"ffn_hidden_size": 256, "hidden_size": 256}))
    export_model(folder, tmp_path / "out", layout="gguf")
    quantised = gguf.GGMLQuantizationType[kind]
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    expected = {}
    for tensor in reader.tensors:
        if "ffn_gate" in tensor.name:
            raw = _raw(kind, tensor.data)
            writer.add_tensor(tensor.name, raw, raw_dtype=quantised)
            expected[tensor.name] = torch.from_numpy(gguf.quants.dequantize(raw, quantised))
        else:
            writer.add_tensor(tensor.name, tensor.data)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    import_model(tmp_path / "small.gguf", tmp_path / "zili")
    loaded = zili.load(tmp_path / "zili")
    for layer in range(2):
        assert torch.equal(loaded.layers[layer].feed_forward.gate.weight, expected[f"blk.{layer}.ffn_gate.weight"])
    exact = zili.load(folder).layers[0].feed_forward.gate.weight
    if kind.endswith("_0") or kind == "Q4_1":
        error = (loaded.layers[0].feed_forward.gate.weight - exact).abs().max() / exact.abs().max()
        assert error < (0.01 if kind == "Q8_0" else 0.15)


def _raw(kind, data):
    if kind == "Q5_K":  # the package reads it and does not write it: any bytes are a matrix
        import numpy as np

        return np.random.default_rng(0).integers(0, 60, (256, 176), dtype=np.uint8)
    return gguf.quants.quantize(data, gguf.GGMLQuantizationType[kind])


def test_a_sentencepiece_tokenizer_comes_back(tmp_path):
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "__", "_", "<reserve1>"]
    words = ["\u2581", "t", "h", "e", "\u2581t", "he", "\u2581the", "你", "好", "你好"]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256, *[Kind.USER_DEFINED] * 4]
    pieces = [Piece(text, 0.0, kind) for text, kind in zip(texts, kinds, strict=True)]
    pieces += [Piece(text, -float(rank), Kind.NORMAL) for rank, text in enumerate(words)]
    before = Tokenizer(definition(pieces, dummy_prefix=True))
    folder, _ = run_of(tmp_path, MODELS["tied"], before)
    export_model(folder, tmp_path / "out", layout="gguf")
    after = open_folder(tmp_path / "out").tokenizer
    for text in (TEXT, "the the\nthe __ 你好 the", ""):
        assert after.encode(text).tolist() == before.encode(text).tolist()
    assert (after.end_id, after.special_tokens) == (2, before.special_tokens)
    stored = gguf.GGUFReader(tmp_path / "out" / "model.gguf").get_field("tokenizer.ggml.token_type").contents()
    assert stored[:3] == [2, 3, 3] and stored[3] == Kind.BYTE and stored[len(pieces)] == Kind.UNUSED
    # What merging finds is a normal piece, or llama.cpp would put a space after it.
    assert [stored[texts.index(text)] for text in ("\n", "__", "<reserve1>")] == [1, 1, Kind.USER_DEFINED]


def test_a_template_travels(tmp_path):
    folder, _ = run_of(tmp_path, MODELS["tied"])
    template = "{% for m in messages %}{{ '<_user>' + m['content'] }}{% endfor %}"
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    export_model(folder, tmp_path / "out", layout="gguf")
    import_model(tmp_path / "out", tmp_path / "zili")
    assert json.loads((tmp_path / "zili" / "tokenizer_config.json").read_text())["chat_template"] == template
    assert export_model(tmp_path / "zili", tmp_path / "back").layout == "llama"


def test_what_gguf_cannot_say_is_refused(tmp_path):
    small = ModelConfig(**SMALL, kv_heads=2, mixture=MixtureConfig(experts=4, top_k=2, ffn_hidden_size=24))
    folder, _ = run_of(tmp_path, small)
    with pytest.raises(CheckpointError, match=r"the gguf layout cannot hold this model: .*mixture"):
        export_model(folder, tmp_path / "out", layout="gguf")
    shutil.rmtree(tmp_path / "run")
    folder, _ = run_of(tmp_path, MODELS["tied"])
    write_tokenizer(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="WordLevel"):
        export_model(folder, tmp_path / "out", layout="gguf")
    assert not (tmp_path / "out").exists()


def test_broken_and_foreign_files(tmp_path):
    folder, _ = run_of(tmp_path, MODELS["tied"])
    export_model(folder, tmp_path / "out", layout="gguf")
    whole = (tmp_path / "out" / "model.gguf").read_bytes()
    for name, content, said in (
        ("cut", whole[:-9000], "no whole GGUF file"),
        ("head", whole[:40], "no whole GGUF file"),
        ("text", b"this is not one", "no whole GGUF file"),
        ("other", whole.replace(b"llama", b"gemma"), "'gemma' is not supported, only 'llama'"),
        ("split", whole.replace(b"qwen2", b"qwen9"), "splits text as 'qwen9'"),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            import_model(tmp_path / f"{name}.gguf", tmp_path / "zili")
        assert not (tmp_path / "zili").exists()
    shutil.copy(tmp_path / "cut.gguf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        zili.load(tmp_path / "out")


def test_a_model_in_several_files(tmp_path):
    """As llama.cpp's gguf-split writes them: the first has the metadata."""
    folder, _ = run_of(tmp_path, MODELS["tied"], Tokenizer.train(["a b"] * 4, 300))
    export_model(folder, tmp_path / "out", layout="gguf")
    whole = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    parts = [tmp_path / "split" / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    parts[0].parent.mkdir()
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        for key, field in whole.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kinds = (field.types[0], field.types[-1]) if len(field.types) > 1 else (field.types[0], None)
                writer.add_key_value(key, field.contents(), *kinds)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for tensor in whole.tensors[number::3]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    ids = torch.arange(5)[None]
    expected = zili.load(tmp_path / "out")(ids)
    for place in (parts[0].parent, parts[0], parts[2]):
        assert torch.equal(zili.load(place)(ids), expected)
        assert tokenizer_of(place) is not None
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf is missing"):
        zili.load(parts[0].parent)


def test_a_real_file(tmp_path):
    """SmolLM2-135M-Instruct, 4 bits, where the package that has it is installed: its tokenizer and first words."""
    try:
        file = demo_file()
    except CheckpointError as error:
        pytest.skip(str(error))
    values, _, reader = open_gguf(file)
    assert values["llama.block_count"] == 30
    tokenizer = Tokenizer(read_tokenizer(reader, file)[0], end_token="<|im_end|>")
    # Its authors' tokenizer.json splits digits one by one, spaces before them by themselves.
    assert tokenizer.encode("x  42").tolist() == [
        *tokenizer.encode("x  ").tolist(),
        *tokenizer.encode("4").tolist(),
        *tokenizer.encode("2").tolist(),
    ]
    opened = open_folder(file)
    prompt = [tokenizer.special_id("<|im_start|>"), *tokenizer.encode("user\nWhat is the capital of France?")]
    prompt += [tokenizer.end_id, *tokenizer.encode("\n"), prompt[0], *tokenizer.encode("assistant\n")]
    from zili.serving.generate.generation import Sampling, generate

    said = generate(
        opened.model, prompt, max_new_tokens=12, sampling=Sampling(temperature=0), stop_ids={tokenizer.end_id}
    )
    assert tokenizer.decode(list(said)).startswith("The capital of France is Paris.")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def values(*given: bytes, count: int | None = None, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(given) if count is None else count) + b"".join(given)


def listed(kind: int, count: int) -> bytes:
    return text(b"x") + struct.pack("<IIQ", 9, kind, count)


FILL = bytes(64)
HOSTILE = [
    (values(listed(0, 2**40), FILL), "counts 1,099,511,627,776 elements"),
    (values(listed(8, 2**61), FILL), "elements and ends after"),
    (values(listed(9, 1), listed(0, 1), FILL), "a value of type 9"),
    (values(listed(8, 4), FILL[:24]), "ends within its header|ends after"),
    (values(count=2**50), "counts 1,125,899,906,842,624 values"),
    (values(tensors=2**50), "tensors and ends after"),
    (values(struct.pack("<Q", 2**63) + FILL), "characters and ends after"),
    (values(text(b"x") + struct.pack("<I", 99)), "a value of type 99"),
    (values(text(b"x"), tensors=1), "ends"),
    (values(tensors=1) + text(b"x") + struct.pack("<I", 2**31) + FILL, "a tensor of 2147483648 dimensions"),
    (b"GGUF", "ends within its header"),
    (b"GGML" + FILL, "does not begin with GGUF"),
]


@pytest.mark.parametrize(("content", "said"), HOSTILE, ids=range(len(HOSTILE)))
def test_counts_that_no_file_has_room_for_are_not_believed(tmp_path, content, said):
    """One of 100 bytes that counts 2^40 elements took all memory there is."""
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        open_gguf(file)


def test_a_large_file_has_no_more_elements_than_a_model(tmp_path):
    file = tmp_path / "model.gguf"
    with file.open("wb") as hole:
        hole.write(values(listed(0, 2**33)))
        hole.truncate(2**34)  # takes no room on a disk
    with pytest.raises(CheckpointError, match="more than 4,194,304 elements"):
        open_gguf(file)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_other_bytes_is_read_or_refused(tmp_path, data):
    whole = values(listed(4, 3), bytes(12), text(b"y") + struct.pack("<I", 8) + text(b"abc"), count=2, tensors=1)
    whole = bytearray(whole + text(b"w") + struct.pack("<IQQIQ", 2, 2, 2, 0, 0) + bytes(64))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    file = tmp_path / "model.gguf"
    file.write_bytes(whole)
    with suppress(CheckpointError):
        open_gguf(file)
