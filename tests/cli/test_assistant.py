"""From a file of conversations to an assistant, by the commands."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from outcome import Zili

from zili.config.model import ModelConfig
from zili.data.tokenizer import Tokenizer
from zili.models.decoder import Decoder
from zili.release.native import write_native
from zili.release.tensors import HeldTensors

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder that knows nothing."""
    tokenizer = Tokenizer.train([f"What is the colour of {thing}? {colour}" for thing, colour in COLOURS.items()], 290)
    config = ModelConfig(
        vocab_size=304, hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn_hidden_size=128, max_length=64
    )
    folder = tmp_path / "model"
    folder.mkdir()
    write_native(folder, config, None, HeldTensors(Decoder(config).state_dict()), 10**9)
    tokenizer.save(folder)
    return folder


def questions(path: Path, count: int) -> Path:
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        thing = draw.choice(list(COLOURS))
        talk = [
            {"role": "user", "content": f"What is the colour of {thing}?"},
            {"role": "assistant", "content": COLOURS[thing]},
        ]
        lines.append(json.dumps({"messages": talk}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def recipe(tmp_path: Path, model: Path, **training: object) -> Path:
    text = f"""
name = "tuned"
folder = "{training.get("folder", tmp_path / "run")}"
[model]
folder = "{model}"
[data]
sources = [{{ store = "{training.get("store", tmp_path / "data" / "train")}" }}]
tokenizer = "{tmp_path / "data" / "tokenizer"}"
{training.get("data", "")}
[training]
{f'start_from = "{training["start_from"]}"' if "start_from" in training else ""}
steps = {training.get("steps", 120)}
sequence_length = 64
global_batch = 4
[optimizer]
learning_rate = {training.get("rate", 3e-3)}
[chip]
compile = false
{training.get("more", "")}
"""
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_model_learns_to_answer_and_is_released(zili: Zili, model: Path, tmp_path: Path) -> None:
    asked = questions(tmp_path / "talk.jsonl", 60)
    made = zili("dialogues", asked, "--model", model, "--to", tmp_path / "data")
    assert made.code == 0, made.err
    assert "60 conversations" in made.out and "left out: nothing" in made.out
    before = json.loads(zili("eval", model, "--answers", asked, "--max-new-tokens", 12, "--json").out)
    trained = zili("train", recipe(tmp_path, model))
    assert trained.code == 0, trained.err
    assert "train: 60 conversations in" in trained.out and f"weights from {model}" in trained.out
    scores = tmp_path / "scores.json"
    told = zili("eval", tmp_path / "run", "--answers", asked, "--max-new-tokens", 12, "--out", scores)
    assert told.code == 0, told.err
    after = json.loads(scores.read_text(encoding="utf-8"))
    assert before["scores"][0]["share"] == 0 and after["scores"][0]["share"] == 1.0
    assert after["scores"][0]["loss"] < 0.2 < before["scores"][0]["loss"]
    assert "100.0" in told.out
    # It is an assistant now: it is talked to in turns, and leaves with its template.
    from zili.serving.model_folder import open_folder

    opened = open_folder(tmp_path / "run")
    assert opened.conversational and opened.dialect is not None
    out = tmp_path / "release"
    assert zili("export", tmp_path / "run", "--to", out, "--as", "llama", "--scores", scores).code == 0
    assert "{%- generation %}" in (out / "chat_template.jinja").read_text(encoding="utf-8")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| talk | exact answers | 1.0000 ± 0.0000 | 60 | 0 |" in card and "model-index" in card
    assert zili("verify", out, "--against", tmp_path / "run").code == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the colour of grass?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = theirs.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == "green"


def test_a_model_learns_what_is_preferred(zili: Zili, model: Path, tmp_path: Path) -> None:
    asked = questions(tmp_path / "talk.jsonl", 60)
    # One that has learned to say "blue" of everything as often as what is right, and is told which of them is wanted.
    lines = asked.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line)["messages"] for line in lines]
    both, pairs = tmp_path / "both.jsonl", tmp_path / "pairs.jsonl"
    blue = [json.dumps({"messages": [question, {**answer, "content": "blue"}]}) for question, answer in records]
    both.write_text("\n".join(lines + blue), encoding="utf-8")
    told = [
        {
            "prompt": [question],
            "chosen": answer["content"],
            "rejected": "green" if answer["content"] == "blue" else "blue",
        }
        for question, answer in records
    ]
    pairs.write_text("\n".join(map(json.dumps, told)), encoding="utf-8")
    assert zili("dialogues", both, "--model", model, "--to", tmp_path / "data").code == 0
    assert zili("train", recipe(tmp_path, model)).code == 0
    before = json.loads(zili("eval", tmp_path / "run", "--answers", asked, "--max-new-tokens", 12, "--json").out)
    assert before["scores"][0]["share"] < 1.0
    made = zili("dialogues", pairs, "--model", tmp_path / "run", "--to", tmp_path / "pairs")
    assert made.code == 0 and f"{len(told)} pairs, " in made.out, made.err
    store = tmp_path / "pairs" / "train"
    wanted = {
        "folder": tmp_path / "preferred",
        "start_from": tmp_path / "run",
        "store": store,
        "data": f'held_out = "{store}"',
        "rate": 1e-3,
        "steps": 60,
        "more": "[preference]\nlikelihood = 0.2\n[evaluation]\nevery = 30",
    }
    trained = zili("train", recipe(tmp_path, model, **wanted))
    assert trained.code == 0, trained.err
    assert f"train: {len(told)} pairs in" in trained.out and f"reference: {len(told)} pairs in" in trained.out
    assert "step 60  held-out pairs: 100.0% preferred as chosen" in trained.out
    after = json.loads(zili("eval", tmp_path / "preferred", "--answers", asked, "--max-new-tokens", 12, "--json").out)
    assert after["scores"][0]["share"] == 1.0
    assert after["scores"][0]["loss"] < before["scores"][0]["loss"]
    # Stores and recipes that do not fit one another.
    for more, said in (
        ({**wanted, "more": ""}, "data.sources are pairs of answers: say how they are learned from, preference.beta"),
        ({**wanted, "store": tmp_path / "data" / "train"}, "preference is given, and data.sources are no pairs"),
        ({"data": f'held_out = "{store}"'}, "holds pairs of answers, and no preference is learned"),
        ({**wanted, "more": "[preference]\nbeta = 0"}, "greater than 0"),
    ):
        found = zili("train", recipe(tmp_path, model, **{**more, "folder": tmp_path / "other"}))
        assert found.code == 3 and said in " ".join((found.out + found.err).split()), found.err
        assert not (tmp_path / "other").exists()


def test_a_reference_that_is_lost_ends_the_run_before_a_step(zili: Zili, model: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Sky?", "chosen": "blue", "rejected": "red"}), encoding="utf-8")
    assert zili("dialogues", pairs, "--model", model, "--to", tmp_path / "data").code == 0
    wanted = {"steps": 2, "more": "[preference]"}
    begun = zili("train", recipe(tmp_path, model, **wanted))
    assert begun.code == 0 and f"weights from {model}" in begun.out and "reference: 1 pair in" in begun.out, begun
    assert "step 1/2  loss 0.693 " in begun.out, "the model that [model] folder names is what it is compared with"
    (tmp_path / "run" / "reference.safetensors").unlink()
    found = zili("train", recipe(tmp_path, model, **{**wanted, "steps": 4}))
    assert found.code == 5 and "what it began as cannot be read" in " ".join(found.err.split()), found.err


@pytest.mark.parametrize("with_text", [False, True])
def test_held_out_conversations_are_scored_by_what_the_assistant_says(
    zili: Zili, model: Path, tmp_path: Path, with_text: bool
) -> None:
    asked = questions(tmp_path / "talk.jsonl", 60)
    assert zili("dialogues", asked, "--model", model, "--to", tmp_path / "data").code == 0
    held_out = tmp_path / "data" / "train"
    if with_text:
        from zili.data.building import build_store
        from zili.data.reading import Document

        held_out = tmp_path / "text"
        build_store([Document("What is the colour of snow? " * 9, "x")], Tokenizer.from_folder(model), held_out)
    trained = zili("train", recipe(tmp_path, model, data=f'held_out = "{held_out}"'))
    assert trained.code == 0, trained.err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    (found,) = [record for record in records if record["kind"] == "eval"]
    if with_text:
        assert "held-out text: " in trained.out and found["bits_per_byte"] > 1
    else:
        # On what was learned: as the training loss.
        assert "step 120  held-out answers: " in trained.out and found["documents"] == 60
        last = [record["loss"] for record in records if record["kind"] == "train"][-20:]
        assert found["loss"] == pytest.approx(sum(last) / 20, abs=0.05)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("dialogues", "no.jsonl", "--model", "MODEL", "--to", "x"), 4, "no.jsonl: no such file or folder"),
        (("dialogues", "BAD", "--model", "MODEL", "--to", "x"), 4, "bad.jsonl: line 1: a turn's role is 'robot'"),
        (("dialogues", "GOOD", "--model", "no-such", "--to", "x"), 5, "does not exist"),
        (("dialogues", "GOOD", "--model", "MODEL", "--template", "chat9", "--to", "x"), 4, "no chat template 'chat9'"),
        (("eval", "MODEL"), 2, "--text, --answers or --tasks"),
        (("eval", "MODEL", "--answers", "BAD"), 4, "bad.jsonl: line 1"),
        (("export", "MODEL", "--to", "x", "--scores", "BAD"), 4, "holds no results of `zili eval --out`"),
        (("chat",), 2, "give a model, or --demo"),
        (("verify", "MODEL"), 5, "no release of `zili export`"),
        (("import", "hf:nothing", "--to", "x"), 3, "names no repository"),
    ],
)
def test_bad_input_is_one_clear_line(
    zili: Zili, model: Path, tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    bad, good = tmp_path / "bad.jsonl", questions(tmp_path / "good.jsonl", 3)
    bad.write_text('{"messages": [{"role": "robot", "content": "x"}]}\n', encoding="utf-8")
    places = {"MODEL": model, "BAD": bad, "GOOD": good, "x": tmp_path / "x"}
    found = zili(*(places.get(word, word) for word in words))
    assert found.code == code, found.err
    assert said in " ".join((found.out + found.err).replace("│", " ").split())
    assert not (tmp_path / "x").exists()


def test_a_model_folder_that_is_none(zili: Zili, tmp_path: Path, model: Path) -> None:
    path = recipe(tmp_path, tmp_path / "nowhere")
    found = zili("train", path)
    assert found.code == 3 and "nowhere' does not exist" in found.err.replace("\n", "")
