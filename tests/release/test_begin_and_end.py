"""What a text begins after and an answer ends with, of imported models, there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from zili.data.dialect import Dialect
from zili.data.tokenizer import Tokenizer
from zili.evaluation.harness import Scorer
from zili.release.companions import chat_template_of, tokenizer_of
from zili.release.exporting import export_model
from zili.release.importing import import_model
from zili.serving.generate.conversation import LiveDialogue, RunningText
from zili.serving.model_folder import OpenedModel

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ASKED = [{"role": "user", "content": "hello"}]


def write_llama3_tokenizer(folder: Path) -> None:
    """Byte-level, with Llama 3's tokens and its post-processor, as transformers writes it."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Inner
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    bos = (SPECIAL[0], inner.token_to_id(SPECIAL[0]))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    ends = [made.convert_tokens_to_ids(text) for text in ("<|end_of_text|>", "<|eom_id|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with such a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tmp_path_factory.mktemp("llama3")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=262, max_position_embeddings=64, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).save_pretrained(made)
    write_llama3_tokenizer(made)
    return made


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(published, tmp_path / "published"))


def check(place: Path, theirs: Any) -> None:
    tokenizer, template = tokenizer_of(place), chat_template_of(place)
    assert tokenizer is not None and template is not None
    expected = theirs.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    dialect = Dialect(template, tokenizer)
    assert dialect.render(ASKED, add_generation_prompt=True).ids == list(expected)
    assert [*tokenizer.begin_ids, *tokenizer.encode("hello world")] == theirs("hello world")["input_ids"]
    named = {theirs.convert_tokens_to_ids(text) for text in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")}
    assert LiveDialogue(dialect).stop_ids >= named


def test_bos_and_ends_there_and_back(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    check(folder, theirs)
    import_model(folder, tmp_path / "zili")
    check(tmp_path / "zili", theirs)
    for layout in ("llama", "gguf"):
        export_model(tmp_path / "zili", tmp_path / layout, layout=layout)
        check(tmp_path / layout, theirs)
    import_model(tmp_path / "gguf", tmp_path / "again")
    check(tmp_path / "again", theirs)
    back = json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"]
    assert set(back) >= {theirs.convert_tokens_to_ids(text) for text in ("<|end_of_text|>", "<|eot_id|>")}


def test_contexts_begin_with_bos(folder: Path) -> None:
    from zili.serving.model_folder import open_folder

    opened: OpenedModel = open_folder(folder)
    bos = opened.tokenizer.token_id("<|begin_of_text|>")
    scorer = Scorer(opened)
    assert scorer.encode_pair("", "hello")[0] == [bos] and scorer.prompt_ids("hello")[0] == bos
    text = RunningText(opened.tokenizer)
    text.ask("hello")
    assert text.prompt(99)[0][0] == bos


def test_a_run_keeps_them(folder: Path, tmp_path: Path) -> None:
    first = Tokenizer.from_folder(folder)
    first.save(tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved")
    assert (again.roles, again.begin_ids, again.end_ids) == (first.roles, first.begin_ids, first.end_ids)


@pytest.mark.parametrize("said", [True, False, None])
def test_a_tokenizer_json_says_itself_whether_bos_is_added(folder: Path, said: bool | None) -> None:
    from transformers import AutoTokenizer

    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config if said is None else {**config, "add_bos_token": said}))
    own = Tokenizer.from_folder(folder)
    assert [*own.begin_ids, *own.encode("x")] == AutoTokenizer.from_pretrained(folder)("x")["input_ids"]


def test_a_document_does_not_begin_after_the_end_of_a_turn(tmp_path: Path) -> None:
    own = Tokenizer.train(["hello"], 270)
    assert own.start_id == own.end_id and own.begin_ids == ()
    content = json.loads(own.definition)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, text in enumerate(("<|endoftext|>", "<|im_end|>"), start=len(content["model"]["vocab"])):
        content["added_tokens"].append({"id": number, "content": text, **flags, "special": True})
    chat = Tokenizer(json.dumps(content), end_token="<|im_end|>")
    assert chat.start_id != chat.end_id and Dialect.named("chatml", chat).end_ids >= {chat.end_id}
