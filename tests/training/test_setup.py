"""What is left to "auto": each choice has its reason, and what cannot run is refused before it costs anything."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from tiny_run import Recipe, train

from zili import ops
from zili.chips import Capability, Device, find_backend
from zili.chips.catalog import find_chip
from zili.config import Choice, RunConfig
from zili.config.presets import load_preset
from zili.errors import ChipError, ConfigError
from zili.models.arithmetic import parameter_shapes
from zili.ops import lowered
from zili.parallel.layout import Layout
from zili.planning.exact.job import Job
from zili.planning.exact.memory import RESERVED, Peaks, fullest, saved_bytes
from zili.planning.fitted.machine import machine
from zili.planning.fitted.rates import rates_of
from zili.planning.search.goodput import Failures
from zili.planning.search.layouts import predicted
from zili.planning.search.plan import Setting, make_plan, setting_config, usual_batch
from zili.rehearsal.fake_world import RehearsedDevice
from zili.training import setup
from zili.training.setup import Setup, set_up

PLAIN = ("chip.operations.linear=reference", "chip.operations.attention=reference")
"""Timing the versions takes a while, so most tests name them."""
GIB = 2**30


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`room(bytes)`: the machine has so much free memory."""
    return lambda size: monkeypatch.setattr(setup, "available_bytes", lambda: size)


def chosen(result: Setup, name: str) -> Choice:
    return next(choice for choice in result.choices if choice.name == name)


def test_every_automatic_choice_has_a_value_and_a_reason(recipe: Recipe) -> None:
    autos = ("chip.name=auto", "chip.precision=auto", "chip.compile=auto", "training.micro_batch=auto")
    result = set_up(recipe(*autos))
    names = {choice.name for choice in result.choices}
    assert names >= {"chip.name", "chip.precision", "chip.compile", "training.micro_batch"}
    assert names >= {f"chip.operations.{name}" for name in ("linear", "attention", "linear_cross_entropy")}
    assert all(choice.value and len(choice.reason) > 5 for choice in result.choices)
    assert '"auto"' not in result.config.model_dump_json()
    for choice in result.choices:
        if choice.name in ("chip.name", "chip.precision", "training.micro_batch"):
            table, key = choice.name.split(".")
            assert str(getattr(getattr(result.config, table), key)) == choice.value


def test_what_is_asked_for_is_taken_and_said_to_be(recipe: Recipe) -> None:
    result = set_up(recipe(*PLAIN))
    for name in ("chip.precision", "chip.compile", "training.micro_batch", "chip.operations.linear"):
        assert chosen(result, name).reason == "asked for"


@pytest.mark.parametrize("asked", ["auto", "4"])
def test_a_run_that_asks_for_more_than_memory_is_refused_with_numbers_before_it_allocates(
    recipe: Recipe, room: Any, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    room(3 * GIB)
    monkeypatch.setattr(ops, "choose", lambda *_: pytest.fail("came further than it should"))
    # 4 layers of 4 * 4096^2 + 3 * 4096 * 10923 weights and 2 * 32000 * 4096 around them: 1.068e9, of 4 bytes 4.0 GiB;
    # two moments of each, 8.0; both once more in a save's copies, 11.9; and gradients as large as weights.
    shape = ("hidden_size=4096", "layers=4", "heads=32", "kv_heads=32", "head_dim=128", "ffn_hidden_size=10923")
    sizes = [f"model.{size}" for size in (*shape, "vocab_size=32000")]
    with pytest.raises(ConfigError, match=r"about 2\d\.\d GiB \(.* has 2\.8 GiB free") as caught:
        set_up(recipe(*sizes, f"training.micro_batch={asked}"))
    for said in ('training.recompute = "full"', "checkpoint 11.9", "optimizer 8.0", "weights 4.0", "gradients 4.0"):
        assert said in str(caught.value)


def bytes_of(config: RunConfig, micro_batch: int) -> float:
    """By the planner, of one process on the host."""
    training = config.training.model_copy(update={"micro_batch": micro_batch})
    chip = config.chip.model_copy(update={"precision": "fp32"})
    resolved = config.model_copy(update={"training": training, "chip": chip})
    return sum(fullest(Job(resolved, Layout(), on_host=True)).values())


def test_the_micro_batch_is_the_largest_divisor_that_fits(recipe: Recipe, room: Any) -> None:
    auto = recipe("training.global_batch=12", "training.micro_batch=auto", "training.sequence_length=32", *PLAIN)
    for fitting, expected in ((1, 1), (2, 2), (3, 3), (5, 4), (11, 6), (12, 12), (500, 12)):
        room(bytes_of(auto, fitting) / 0.7 / (1 - RESERVED) + 1)  # 30 % are left free
        result = set_up(auto)
        assert result.config.training.micro_batch == expected
        assert "GiB" in chosen(result, "training.micro_batch").reason
    room(bytes_of(auto, 1) / (1 - RESERVED) - 10)
    with pytest.raises(ConfigError, match="smaller micro_batch"):
        set_up(auto)


def test_copies_of_a_save_are_part_of_what_fits(recipe: Recipe, room: Any) -> None:
    """Weights and both moments of AdamW: 12 bytes a parameter, as many as the model has."""
    parameters = sum(prod(shape) for shape in parameter_shapes(recipe().model).values())
    before, after = (bytes_of(recipe(f"checkpoint.asynchronous={way}"), 1) for way in ("false", "true"))
    assert after - before == 12 * parameters
    tiers = 'checkpoint.tiers=[{place="/scratch", every=1}, {place="s3://bucket", every=5}]'
    assert bytes_of(recipe("checkpoint.asynchronous=true", tiers), 1) - before == 3 * 12 * parameters
    assert bytes_of(recipe("checkpoint.asynchronous=false", tiers), 1) == before
    room((before + after) / 2 / (1 - RESERVED))
    with pytest.raises(ConfigError, match="checkpoint"):
        set_up(recipe(*PLAIN, "training.micro_batch=1", "checkpoint.asynchronous=true"))
    set_up(recipe(*PLAIN, "training.micro_batch=1", "checkpoint.asynchronous=false"))


def test_a_chip_whose_host_has_no_room_for_copies_is_refused(recipe: Recipe, room: Any) -> None:
    room(1000)
    config = recipe("training.micro_batch=1", "checkpoint.asynchronous=true", "chip.precision=fp32")
    with pytest.raises(ConfigError, match=r"copies .* set checkpoint.asynchronous = false"):
        setup._with_room_for_copies(Job(config, Layout()))
    config = config.changed(checkpoint={"tiers": [{"place": "/scratch", "every": 1}]})
    copies = saved_bytes(Job(config, Layout()))
    room(int(1.5 * copies))
    with pytest.raises(ConfigError, match=r"leave out a tier of checkpoint.tiers, or set checkpoint.asynchronous"):
        setup._with_room_for_copies(Job(config, Layout()))


def test_a_host_without_room_keeps_no_states_in_memory(
    recipe: Recipe, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe("training.micro_batch=1", "checkpoint.asynchronous=false", "chip.precision=fp32")
    job = Job(config, Layout(), on_host=True)
    states = 5 * saved_bytes(job)
    monkeypatch.setenv("ZILI_AGENT", "127.0.0.1:1")
    # Of a later life the agent has the states of the one before, which take no room beside themselves.
    for free, held, kept in ((2.1, 0.0, 1), (1.9, 0.0, 0), (1.5, 1.0, 1)):
        room(int(free * states))
        monkeypatch.setenv("ZILI_HELD_BYTES", str(int(held * states)))
        found, choices = setup._with_room_for_copies(job)
        assert found.checkpoint.memory == kept
        assert [choice.name for choice in choices] == ["checkpoint.memory"] * (1 - kept)


@pytest.mark.parametrize("chip", ["ascend-910b2", "h100-sxm"])
@pytest.mark.parametrize("preset", ["telechat2-3b", "telechat3-105b-a4.7b"])
def test_what_the_planner_recommends_is_accepted(preset: str, chip: str) -> None:
    """On an empty chip, by the very numbers that the plan has shown."""
    found = find_chip(chip)
    config = setting_config(load_preset(preset), 4096, usual_batch(64, 4096), 1e12, "x")
    best = make_plan(Setting(config, 1e12, Failures()), found, 64).best
    device = RehearsedDevice(find_backend(found.backend or ""), found, {})
    resolved, _ = setup._fitted(best.config, best.layout, device, None)
    assert resolved == best.config
    assert best.bytes <= device.memory()["total"] * (1 - RESERVED)


def test_a_plan_and_a_run_count_the_same_repeated_heads() -> None:
    """8 of 48 heads have keys and values, and MLU's attention takes none for several."""
    chip, grouped = find_chip("mlu370-x8"), {"grouped_heads_attention": True}
    config = setting_config(load_preset("telechat3-36b"), 4096, 128, 1e12, "x")
    parallel = config.parallel.model_copy(update={"tensor": 8, "shards": 8})
    config = config.model_copy(update={"parallel": parallel})
    found = predicted(config, 64, machine(chip), rates_of(chip.family))
    taken = config.model_copy(update={"chip": config.chip.model_copy(update={"capabilities": grouped})})
    fewer = predicted(taken, 64, machine(chip), rates_of(chip.family))
    # 40 heads more of 128 numbers, twice, in bf16, of 4,096 tokens in each of 64 layers; an eighth of them here.
    assert found.bytes - fewer.bytes == 40 * 128 * 2 * 2 * 4096 * 64 / 8
    device = RehearsedDevice(find_backend("cambricon"), chip, {})
    assert sum(fullest(setup.job_here(found.config, found.layout, device)).values()) == found.bytes


def test_whole_gradients_are_kept_only_where_they_fit(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes: with room for whole gradients they are summed once a step, else after each micro-batch, and a
    run keeps what it has begun with."""
    config = recipe("training.micro_batch=1", "training.global_batch=8", "chip.precision=fp32")
    layout = Layout(shards=2)
    device = set_up(recipe(*PLAIN)).device
    once, each = (
        sum(fullest(Job(reduced(config, when), layout, on_host=True)).values()) for when in ("step", "micro_batch")
    )
    parameters = sum(prod(shape) for shape in parameter_shapes(config.model).values())
    assert once - each > 4 * parameters * 0.3
    for room, expected in ((once + 100, "step"), ((once + each) / 2, "micro_batch")):
        monkeypatch.setattr(setup, "_free_bytes", lambda _, room=room: room)
        resolved, choices = setup._fitted(config, layout, device, None)
        assert resolved.parallel.reduce == expected
        assert next(choice for choice in choices if choice.name == "parallel.reduce").value == expected


def reduced(config: RunConfig, when: str) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"reduce": when})})


def test_an_unknown_chip_is_refused_with_the_nearest(recipe: Recipe) -> None:
    with pytest.raises(ChipError, match="no backend is named 'asend'; did you mean ascend"):
        set_up(recipe("chip.name=asend"))


@pytest.mark.parametrize("without", ["no PATH", "CXX points nowhere"])
def test_without_a_compiler_blocks_run_eagerly_and_a_line_says_so(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    if without == "no PATH":
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setenv("CXX", "/nowhere/g++")
    result = set_up(recipe("chip.compile=auto", *PLAIN))
    assert result.config.chip.compile is False
    line = str(chosen(result, "chip.compile"))
    assert line.startswith("chip.compile = false: no C++ compiler") and line.endswith("blocks run eagerly")


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """`speeds(ratio, rate)`: faster versions are `ratio` times as fast, and a product runs at `rate` FLOP/s; nothing is
    known from other tests."""
    monkeypatch.setenv("ZILI_CACHE", str(tmp_path / "cache"))

    def become(ratio: float, rate: float = 1e11) -> None:
        monkeypatch.setattr("zili.ops.registry._speed_ratio", lambda *_: ratio)
        monkeypatch.setattr("zili.training.throughput.matmul_peak", lambda *_: rate)

    return become


def test_what_was_measured_once_on_a_machine_decides_its_later_runs(recipe: Recipe, speeds: Any) -> None:
    speeds(1.5)
    plain, name = PLAIN[0], "chip.operations.attention"
    first = chosen(set_up(recipe(plain)), name)
    assert first.value == "blocked"
    speeds(0.5)  # somebody else uses the machine now
    assert chosen(set_up(recipe(plain)), name) == first
    threads = torch.get_num_threads()
    other = set_up(recipe(plain, f"chip.threads={threads + 1}"))
    torch.set_num_threads(threads)
    assert chosen(other, name).value == "reference", "other threads, other speeds"


def test_blocks_are_compiled_where_that_pays(recipe: Recipe, speeds: Any) -> None:
    speeds(1.5, rate=1e9)
    auto, few, many = "chip.compile=auto", "training.steps=100", "training.steps=20000"
    # 2 layers of 7,680 weights and the output's 304 x 32, times 6, and 6 x 2 x 32 x 32 for attention: 162,816 FLOPs a
    # token; 128 tokens a step, and half of 1e9 FLOP/s: 24 steps a second.
    short, long = set_up(recipe(auto, few, *PLAIN)), set_up(recipe(auto, many, *PLAIN))
    assert short.config.chip.compile is False
    assert chosen(short, "chip.compile").reason == "about 4 s of steps: it would save 0 s and cost 20 s"
    assert long.config.chip.compile is True
    assert chosen(long, "chip.compile").reason == "about 834 s of steps: it would save 67 s and cost 20 s"
    speeds(1.5, rate=1e12)
    assert set_up(recipe(auto, many, *PLAIN)).config.chip.compile is True, "another reading of the rate changes nothing"


@pytest.mark.parametrize("compiled", [True, False])
def test_whether_a_run_is_compiled_stands_in_its_checkpoint(recipe: Recipe, speeds: Any, compiled: bool) -> None:
    speeds(1.5, rate=1e9)
    config = recipe("training.steps=2")
    train(config)
    state = config.folder / "checkpoints" / "step-00000002" / "run.json"
    text = state.read_text(encoding="utf-8")
    assert '"compile": false' in text
    state.write_text(text.replace('"compile": false', f'"compile": {str(compiled).lower()}'), encoding="utf-8")
    for steps in (100, 20_000):
        result = set_up(recipe("chip.compile=auto", f"training.steps={steps}", *PLAIN))
        assert result.config.chip.compile is compiled
        assert "checkpoint" in chosen(result, "chip.compile").reason


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`units(true_or_false)`: whether the CPU has bf16 units."""

    def has(value: bool) -> None:
        said = Capability(value, f"bf16 units: {value}", "run")
        monkeypatch.setattr(
            "zili.chips.device.Device.capability", lambda self, name: said if name == "bf16" else ask(self, name)
        )

    ask = Device.capability
    return has


def test_a_new_run_takes_bf16_where_the_cpu_has_it_and_it_agrees_and_is_faster(
    recipe: Recipe, units: Any, speeds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds(1.5)
    auto = ("chip.precision=auto", *PLAIN)
    for has, ratio, expected in ((True, 1.6, "bf16"), (True, 0.3, "bf16"), (False, 1.6, "fp32")):
        units(has)
        monkeypatch.setattr("zili.ops.lowered._speed_ratio", lambda ratio=ratio: ratio)
        result = set_up(recipe(*auto))
        assert result.config.chip.precision == expected, "and a second reading of the speed changes nothing"
        assert f"bf16 units: {has}" in chosen(result, "chip.precision").reason
    monkeypatch.setenv("ZILI_CACHE", str(recipe().folder / "another-machine"))
    units(True)
    monkeypatch.setattr("zili.ops.lowered._speed_ratio", lambda: 1.0)
    assert set_up(recipe(*auto)).config.chip.precision == "fp32"


def test_bf16_that_is_wrong_on_a_cpu_is_not_taken(
    recipe: Recipe, units: Any, monkeypatch: pytest.MonkeyPatch, speeds: Any
) -> None:
    units(True)
    monkeypatch.setattr("zili.ops.lowered._speed_ratio", lambda: 2.0)
    right = lowered._lowered

    def wrong(inputs: Any, operation: str) -> list[torch.Tensor]:
        found = right(inputs, operation)
        return [found[0], *(1.05 * gradient for gradient in found[1:])]

    speeds(1.5)
    monkeypatch.setattr(lowered, "_lowered", wrong)
    result = set_up(recipe("chip.precision=auto", *PLAIN))
    assert result.config.chip.precision == "fp32"
    assert "5.0% off fp32 in linear" in chosen(result, "chip.precision").reason


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("has", [True, False])
def test_a_run_keeps_the_precision_of_its_checkpoint_wherever_it_goes_on(
    recipe: Recipe, units: Any, precision: str, has: bool
) -> None:
    train(recipe(f"chip.precision={precision}", "training.steps=2"))
    units(has)
    result = set_up(recipe("chip.precision=auto", *PLAIN))
    assert result.config.chip.precision == precision
    reason = chosen(result, "chip.precision").reason
    assert "checkpoint" in reason and ("bf16 units: False" in reason) == (precision == "bf16" and not has)


def test_bf16_on_the_cpu_runs_when_asked_for(recipe: Recipe) -> None:
    assert set_up(recipe("chip.precision=bf16")).config.chip.precision == "bf16"


def test_a_resumed_run_keeps_its_operations_and_its_micro_batch(recipe: Recipe, room: Any) -> None:
    first = {"linear": "reference", "attention": "blocked", "linear_cross_entropy": "reference"}
    ops.choose("cpu", "fp32", first)
    train(recipe("training.micro_batch=1"))
    room(64 * GIB)
    result = set_up(recipe("training.micro_batch=auto"))
    assert {name: ops.chosen()[name] for name in first} == first
    for name in ("training.micro_batch", *(f"chip.operations.{name}" for name in first)):
        assert "checkpoint" in chosen(result, name).reason
    assert result.config.training.micro_batch == 1
    assert {choice.name for choice in result.choices if "operations" in choice.name} == {
        f"chip.operations.{name}" for name in first
    }, "an operation without another version is no choice"


def test_the_recipe_has_the_last_word_over_the_checkpoint(recipe: Recipe) -> None:
    ops.choose("cpu", "fp32", {"attention": "blocked", "linear": "reference"})
    train(recipe())
    result = set_up(recipe(*PLAIN))
    assert chosen(result, "chip.operations.attention")[1:] == ("reference", "asked for")


def test_a_run_that_moves_to_another_precision_chooses_anew(recipe: Recipe) -> None:
    ops.choose("cpu", "fp32", dict.fromkeys(ops.chosen(), "reference"))
    train(recipe())
    result = set_up(recipe("chip.precision=bf16"))
    assert chosen(result, "chip.operations.linear_cross_entropy").value == "chunked"


def test_what_falls_back_is_said_and_what_is_not_used_is_not(recipe: Recipe) -> None:
    lacks = [f"chip.capabilities.{name}=false" for name in ("fused_adamw", "bf16_reduce", "fsdp2")]
    result = set_up(recipe(*PLAIN, *lacks))
    said = [str(choice) for choice in result.choices if "capabilities" in choice.name]
    assert said == [
        "chip.capabilities.fused_adamw = false: as the recipe says (chip.capabilities); "
        "AdamW updates by its loop of operations"
    ]
    assert [choice for choice in set_up(recipe(*PLAIN)).choices if "capabilities" in choice.name] == []


def test_it_is_said_whether_steps_are_judged_and_what_waits_for_it(recipe: Recipe) -> None:
    def said(*overrides: str) -> str:
        return next(str(choice) for choice in set_up(recipe(*overrides)).choices if choice.name == "watch")

    assert said() == "watch = what is logged or saved: [watch] leaves out no batch; what is no number ends the run"
    spikes = ("watch.spike=skip", "watch.fewest=2")
    assert "spike skip" in said(*spikes) and "nothing waits" in said(*spikes)
    assert "each update waits" in said(*spikes, "optimizer.name=muon")


def test_an_operation_that_needs_what_the_chip_lacks_is_not_tried(recipe: Recipe) -> None:
    mixture = "model.mixture={experts=4,top_k=2,ffn_hidden_size=32}"
    result = set_up(recipe(*PLAIN, mixture, "chip.capabilities.grouped_matmul=false"))
    choice = chosen(result, "chip.operations.grouped_matmul")
    assert choice.value == "reference" and choice.reason == "grouped: as the recipe says (chip.capabilities)"


def test_a_capability_that_does_not_exist_is_refused_with_the_nearest(recipe: Recipe) -> None:
    with pytest.raises(ChipError, match="no capability is named 'fsdp'; did you mean fsdp2"):
        set_up(recipe("chip.capabilities.fsdp=false"))


def test_weights_that_stay_whole_count_whole(recipe: Recipe) -> None:
    config = recipe("training.micro_batch=1", "chip.precision=fp32", "training.global_batch=8")
    sharded, whole = (Peaks(Job(config, Layout(shards=4), sharded=can)).at(0) for can in (True, False))
    parameters = sum(prod(shape) for shape in parameter_shapes(config.model).values())
    assert whole["weights"] == 4 * parameters and whole["optimizer"] == 8 * parameters
    assert 4 * parameters / 4 <= sharded["weights"] < 1.1 * 4 * parameters / 4
    assert not whole.get("gathered weights") and sharded["gathered weights"]


def test_deterministic_runs_refuse_a_chip_that_cannot(recipe: Recipe) -> None:
    with pytest.raises(ChipError, match=r"does not repeat bit by bit.*unset chip.deterministic"):
        set_up(recipe("chip.deterministic=true", "chip.capabilities.deterministic=false"))


def test_a_deterministic_run_trains_and_repeats(recipe: Recipe) -> None:
    mixture = "model.mixture={experts=4,top_k=2,ffn_hidden_size=32}"
    config = recipe("chip.deterministic=true", mixture)
    try:
        set_up(config)
        assert torch.are_deterministic_algorithms_enabled()
        first, second = (train(config.model_copy(update={"folder": config.folder / name})) for name in "ab")
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, one), (_, other) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_whether_bf16_pays_is_timed_on_products_of_a_steps_size(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(lowered, "_lowered", lambda inputs, _: timed.append(inputs.arguments))
    monkeypatch.setattr("zili.ops.timings._ROUNDS", 1)
    lowered._speed_ratio()
    ((x, weight, *_),) = timed
    assert x.numel() * len(weight) >= 2**28, "multiply-adds: smaller ones were 1.7 times as fast, and a step 0.65 times"
