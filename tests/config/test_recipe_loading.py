"""Recipes: overrides, presets, refusals, and the way there and back."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zili.config import ModelConfig, RunConfig, build_config, dump_recipe, load_preset, load_recipe, preset_names
from zili.config.fields import fields_at
from zili.errors import ConfigError
from zili.training.callbacks.named import OWN as OWN_CALLBACKS

SMALLEST = """
[model]
vocab_size = 300
hidden_size = 32
layers = 2
heads = 2
kv_heads = 1
head_dim = 16
ffn_hidden_size = 48
[data]
tokenizer = "tokenizer"
[[data.sources]]
store = "train"
[training]
steps = 10
"""


def built(*overrides: str, text: str = SMALLEST) -> RunConfig:
    return build_config(tomllib.loads(text), overrides, origin="recipe.toml")


def refusal(*overrides: str, text: str = SMALLEST) -> str:
    with pytest.raises(ConfigError) as caught:
        built(*overrides, text=text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("optimizer.learning_rate=3e-4", ("optimizer", "learning_rate"), 3e-4),
        ("optimizer.betas=[0.8, 0.99]", ("optimizer", "betas"), (0.8, 0.99)),
        ("name=first-light", ("name",), "first-light"),
        ('name="first-light"', ("name",), "first-light"),
        (" schedule.kind = wsd ", ("schedule", "kind"), "wsd"),
        ("logging.tensorboard=true", ("logging", "tensorboard"), True),
        ("chip.compile=auto", ("chip", "compile"), "auto"),
        ("chip.compile=false", ("chip", "compile"), False),
        ("chip.operations.linear=reference", ("chip", "operations"), {"linear": "reference"}),
        ("model.rotary.base=5e5", ("model", "rotary", "base"), 5e5),
        ("folder=runs/a=b", ("folder",), Path("runs/a=b")),
        ("data.tokenizer=分词器", ("data", "tokenizer"), Path("分词器")),
        ('data.sources=[{store="a", weight=2}]', ("data", "sources", 0, "weight"), 2.0),
    ],
)
def test_an_override_sets_its_key(override: str, place: tuple[str | int, ...], value: object) -> None:
    found: object = built(override)
    for part in place:
        found = found[part] if isinstance(part, int) else getattr(found, part)  # type: ignore[index]
    assert found == value and type(found) is type(value)


def test_a_later_override_wins() -> None:
    assert built("seed=1", "seed=2").seed == 2


def test_overrides_leave_the_callers_table_alone() -> None:
    table = tomllib.loads(SMALLEST)
    build_config(table, ["model.layers=4", "optimizer.name=muon"], origin="recipe.toml")
    assert table == tomllib.loads(SMALLEST)


@pytest.mark.parametrize("override", ["seed", "=3", ".seed=3", "model..layers=3", ""])
def test_a_malformed_override_is_quoted_with_the_right_form(override: str) -> None:
    message = refusal(override)
    assert repr(override) in message and "--set table.key=value" in message


def test_an_override_below_a_value_is_refused() -> None:
    assert "'steps' is a value, not a table" in refusal("training.steps.x=1")


def test_a_line_end_in_an_override_smuggles_no_second_key_in() -> None:
    assert "seed" in refusal("seed=3\nname='other'")


@pytest.mark.parametrize(
    ("override", "unknown", "meant"),
    [
        ("optimizer.learnig_rate=1", "optimizer.learnig_rate", "optimizer.learning_rate"),
        ("model.rotary.bas=1", "model.rotary.bas", "model.rotary.base"),
        ("training.learning_rate=1", "training.learning_rate", "optimizer.learning_rate"),
        ("steps=1", "steps", "training.steps"),
        ("training.learnig_rate=1", "training.learnig_rate", "optimizer.learning_rate"),
        ("optimiser.name=muon", "optimiser", "optimizer"),
        ('data.sources=[{stor="a", store="b"}]', "data.sources.0.stor", "data.sources.0.store"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(override: str, unknown: str, meant: str) -> None:
    assert f"unknown key {unknown}; did you mean {meant}?" in refusal(override)


def test_an_unknown_key_like_no_other_is_refused_with_the_known_ones() -> None:
    assert "unknown key logging.xyzzy; known keys here: every, line_seconds, tensorboard" in refusal("logging.xyzzy=1")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.heads=3", "model.kv_heads=2"], ["heads (3)", "kv_heads (2)"]),
        (["model.head_dim=7"], ["head_dim (7)"]),
        (["training.global_batch=8", "training.micro_batch=3"], ["global_batch (8)", "micro_batch (3)"]),
        (["schedule.warmup_steps=10"], ["warmup_steps (10)", "steps (10)"]),
        (["training.sequence_length=9000"], ["sequence_length (9000)", "max_length (8192)"]),
        (["model.rotary.rule=yarn"], ["'yarn'", "original_length"]),
        (["training.steps=0"], ["training.steps", "greater than 0", "got 0"]),
        (["optimizer.betas=[1.0, 0.9]"], ["optimizer.betas.0", "less than 1", "got 1.0"]),
        (["optimizer.learning_rate=nan"], ["optimizer.learning_rate", "finite", "got nan"]),
        (["optimizer.clip=inf"], ["optimizer.clip", "finite", "got inf"]),
        (["checkpoint.keep=1"], ["checkpoint.keep", "2", "got 1"]),
        (["optimizer.name=sgd"], ["optimizer.name", "'adamw' or 'muon'", "got 'sgd'"]),
        (["data.sources=[]"], ["data.sources", "at least 1"]),
        (["name=a/b"], ["name", "got 'a/b'"]),
    ],
)
def test_an_invalid_value_is_refused_with_the_numbers(overrides: list[str], parts: list[str]) -> None:
    message = refusal(*overrides)
    assert message.startswith("recipe.toml cannot be run:")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("override", ["chip.compile=maybe", "training.micro_batch=many"])
def test_a_refusal_names_the_key_and_not_pydantics_branches(override: str) -> None:
    key = override.partition("=")[0]
    assert f"  {key}: " in refusal(override) and f"{key}." not in refusal(override)


def test_every_flaw_is_named_at_once() -> None:
    message = refusal("training.steps=0", "optimizer.momentum=2", "seeds=1")
    assert all(part in message for part in ("training.steps", "optimizer.momentum", "did you mean seed?"))


def test_a_missing_key_is_named() -> None:
    assert "training.steps is missing" in refusal(text=SMALLEST.replace("steps = 10", ""))


def test_keys_beside_a_preset_override_it_and_leave_the_rest() -> None:
    text = '[model]\npreset = "telechat2-3b"\nlayers = 2\nrotary = { base = 7.0 }\n' + SMALLEST.split("48")[1]
    model, preset = built(text=text).model, ModelConfig.model_validate(load_preset("telechat2-3b"))
    assert (model.layers, model.rotary.base) == (2, 7.0)
    assert model.rotary == preset.rotary.model_copy(update={"base": 7.0})
    assert model == preset.model_copy(update={"layers": 2, "rotary": model.rotary})


def test_a_preset_can_be_named_by_an_override() -> None:
    text = "[model]" + SMALLEST.split("48")[1]
    assert built("model.preset=telechat2-7b", text=text).model == ModelConfig.model_validate(
        load_preset("telechat2-7b")
    )


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.preset=telechat2-115", ["'telechat2-115'", "did you mean 'telechat2-115b'?"]),
        ("model.preset=zzz", ["'zzz'", "tele-flm-52b"]),
        ("model.preset=7", ["recipe.toml", "in quotes"]),
    ],
)
def test_an_unknown_preset_is_refused(override: str, parts: list[str]) -> None:
    message = refusal(override)
    assert all(part in message for part in parts), message


def test_a_rotary_that_is_no_table_is_refused_beside_a_preset_too() -> None:
    assert "model.rotary" in refusal("model.preset=telechat2-7b", "model.rotary=yarn")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_survives_the_way_to_toml_and_back(name: str) -> None:
    config = built(f"model.preset={name}", text="[model]" + SMALLEST.split("48")[1])
    assert built(text=dump_recipe(config)) == config


finite = {"allow_nan": False, "allow_infinity": False}


@given(
    rate=st.floats(min_value=0, exclude_min=True, **finite),
    seed=st.integers(0, 2**63 - 1),
    folder=st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1),
    store=st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1),
    weight=st.floats(min_value=1e-300, **finite),
    operations=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    micro=st.sampled_from(["auto", 1, 2, 4, 8]),
    attention_factor=st.none() | st.floats(min_value=1e-3, **finite),
)
def test_a_dumped_recipe_reads_back_equal(
    rate: float,
    seed: int,
    folder: str,
    store: str,
    weight: float,
    operations: dict[str, str],
    micro: int | str,
    attention_factor: float | None,
) -> None:
    table = tomllib.loads(SMALLEST)
    table.update(folder=folder, seed=seed, optimizer={"learning_rate": rate}, chip={"operations": operations})
    table["data"]["sources"] = [{"store": store, "weight": weight}, {"store": "second"}]
    table["training"]["micro_batch"] = micro
    table["model"]["rotary"] = {"attention_factor": attention_factor}
    config = build_config(table, origin="hypothesis")
    assert build_config(tomllib.loads(dump_recipe(config)), origin="dumped") == config


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["cannot read the recipe", "No such file"]),
        (b"[model\n", ["is not valid TOML", "line 1"]),
        (b"name = '\xff'", ["cannot read the recipe", "utf-8"]),
    ],
)
def test_an_unreadable_recipe_is_named(tmp_path: Path, content: bytes | None, parts: list[str]) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        built().training.steps = 3  # type: ignore[misc]


TYPED = tomllib.loads(files("zili.config").joinpath("typed.toml").read_text(encoding="utf-8"))


def is_key(dotted: str) -> bool:
    *place, last = dotted.split(".")
    named = ("model.folder", "model.preset", "chip.operations.attention")
    return last in fields_at(place) or dotted in named or (place == ["callbacks"] and last in OWN_CALLBACKS)


@pytest.mark.parametrize("typed", TYPED["keys"])
def test_what_people_type_is_answered_with_keys_that_there_are(typed: str) -> None:
    said = TYPED["keys"][typed]
    keys = re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b", said.replace("metrics.jsonl", "").replace("zili.data.prepare", ""))
    assert all(map(is_key, keys)), said
    assert keys or said.split(",")[0].split()[0] in (*RunConfig.model_fields, "how", "nothing:")
    assert re.fullmatch(r"([a-z]+\.)?[a-z0-9]+", typed) and not is_key(f"training.{typed}")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lr=1e-3", "did you mean optimizer.learning_rate?"),
        ("training.lr=1e-3", "did you mean optimizer.learning_rate?"),
        ("trainer.max_steps=3", "unknown key trainer; did you mean training.steps?"),
        ("peft.r=8", "unknown key peft; did you mean model.lora?"),
        ("training.max_length=3", "did you mean training.sequence_length?"),
        ("data.path=x", "here it is data.sources"),
        ("lr=1e-3", "did you mean optimizer.learning_rate?"),
        ("training.batch_size=8", "did you mean training.global_batch?"),
        ("per_device_train_batch_size=8", "did you mean training.micro_batch?"),
        ("training.epochs=3", "here it is training.steps"),
        ("training.num_train_epochs=3", "here it is training.steps"),
        ("training.warmup=3", "did you mean schedule.warmup_steps?"),
        ("tensor_model_parallel_size=8", "did you mean parallel.tensor?"),
        ("chip.precision=fp16", "there is no fp16 here"),
        ("chip.precision=bfloat16", "did you mean bf16?"),
        ("chip.precision=fp16", "must be 'fp32' or 'bf16', or 'auto' (got 'fp16')"),
        ("training.steps=abc", "training.steps: must be a whole number (got 'abc')"),
        ("training.micro_batch=many", "must be a whole number, or 'auto' (got 'many')"),
        ("schedule.warmup_steps=10", "set schedule.warmup_steps = 0"),
    ],
)
def test_what_is_known_from_elsewhere_is_answered_in_plain_words(override: str, told: str) -> None:
    message = refusal(override)
    assert told in message and "Input should" not in message and "parse" not in message


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_none_takes_a_key_out_again(word: str) -> None:
    text = SMALLEST + 'start_from = "there"\nmicro_batch = 2\n[model.lora]\nrank = 4\n'
    assert built(text=text).training.start_from == Path("there")
    config = built(f"training.start_from={word}", f"training.micro_batch={word}", f"model.lora={word}", text=text)
    assert config.training.start_from is None and config.model.lora is None
    assert config.training.micro_batch == "auto", "the default, where there is one"
    assert "training.steps is missing" in refusal(f"training.steps={word}")
    assert "did you mean optimizer.learning_rate?" in refusal("optimizer.lr=1", f"seed={word}")


def test_none_unsets_what_a_preset_has_and_is_a_word_where_it_is_one() -> None:
    text = '[model]\npreset = "telechat3-105b-a4.7b"\n' + SMALLEST.split("48")[1]
    assert built(text=text).model.mixture is not None
    assert built("model.mixture=none", text=text).model.mixture is None
    assert built("training.recompute=full", "training.recompute=none").training.recompute == "none"


def test_a_changed_copy_is_one_that_a_recipe_could_say() -> None:
    config = built("training.global_batch=8", "schedule.warmup_steps=4")
    longer = config.changed(training={"steps": 20, "micro_batch": 2}, seed=3)
    assert longer == built(
        *("training.global_batch=8", "schedule.warmup_steps=4"),
        *("training.steps=20", "training.micro_batch=2", "seed=3"),
    )
    assert config == built("training.global_batch=8", "schedule.warmup_steps=4") and longer.model is config.model
    assert longer.training.model_fields_set == config.training.model_fields_set | {"micro_batch"}
    assert config.chip.changed(operations={"linear": "reference"}).operations == {"linear": "reference"}
    assert config.model.changed(mixture={"experts": 4, "top_k": 2, "ffn_hidden_size": 8}).mixture is not None


@pytest.mark.parametrize(
    ("updates", "said"),
    [
        ({"training": {"steps": 2}}, r"warmup_steps \(4\) leaves none of training.steps \(2\)"),
        ({"training": {"micro_batch": 3}}, r"global_batch \(8\) is not a multiple of training.micro_batch \(3\)"),
        ({"training": {"stepz": 2}}, "stepz: Extra inputs"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"model": {"kv_heads": 7}}, r"heads \(2\) is not a multiple of kv_heads \(7\)"),
    ],
)
def test_a_change_that_no_recipe_could_say_is_refused(updates: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        built("training.global_batch=8", "schedule.warmup_steps=4").changed(**updates)
