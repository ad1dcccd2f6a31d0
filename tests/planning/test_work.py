"""FLOPs and parameters are counted once: what is published, what a process has, and what takes time are the same."""

from __future__ import annotations

from dataclasses import fields, replace
from math import prod

import pytest

from zili.config.model import ModelConfig
from zili.config.presets import load_preset
from zili.models.arithmetic import count_parameters, parameter_shapes
from zili.parallel.layout import lay_out
from zili.planning.exact.job import Job
from zili.planning.exact.weights import held, weight_groups
from zili.planning.exact.work import attention, flops, logits
from zili.planning.fitted.machine import Machine
from zili.planning.fitted.rates import Rates
from zili.planning.fitted.step_time import step_time
from zili.planning.run import Recompute, Run
from zili.planning.search.plan import setting_config

PEAK = 1e12
MACHINE = Machine("ideal", PEAK, PEAK, memory=1e30, link=1e30, domain=8, network=1e30)
IDEAL = Rates(**dict.fromkeys((field.name for field in fields(Rates)), 1.0))
"""Every product at the peak, and all else at no cost worth a digit."""
RATES = replace(IDEAL, expert_width=0.0, launch=0.0, hop=0.0, waiting=0.0)


def job(preset: str, *, recompute: Recompute = "none", **parallel: int) -> Job:
    model = ModelConfig(**{**load_preset(preset), "layers": 4})
    config = setting_config(model.model_dump(exclude_unset=True), 4096, 64, 1e9, "work")
    config = config.changed(parallel=parallel, training={"recompute": recompute})
    layout = lay_out(config, prod(size for name, size in parallel.items() if name != "expert"))
    return Job(config, layout)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("preset", "parallel"),
    [
        ("telechat2-7b", {}),
        ("telechat2-115b", {"tensor": 8}),
        ("telechat3-105b-a4.7b", {"tensor": 2, "shards": 4, "expert": 8}),
        ("zili-1t-a32b", {"tensor": 4, "shards": 4, "expert": 8}),
    ],
)
def test_what_takes_time_is_what_is_executed(preset: str, parallel: dict[str, int], recompute: Recompute) -> None:
    """The FLOPs that a rehearsal executes (test_closed_forms.py), less the masked half that a fused kernel skips."""
    planned = job(preset, recompute=recompute, **parallel)
    time, run = step_time(planned.run, MACHINE, RATES), planned.run
    executed = sum(flops(planned).values())
    times = run.micro_batches * len(planned.layers)
    scores = times * (sum(attention(run)) + (attention(run)[0] if recompute == "full" else 0.0))
    assert time.attention * PEAK == pytest.approx(scores / 2)
    assert time.products * PEAK == pytest.approx(executed - scores)


def test_logits_of_preferences_are_made_twice() -> None:
    once = job("telechat2-7b").run
    twice = replace(once, logits_twice=True)
    more = step_time(twice, MACHINE, RATES).products - step_time(once, MACHINE, RATES).products
    assert more * PEAK == pytest.approx(once.micro_batches * logits(once))


def test_software_that_repeats_a_block_whole_repeats_its_last_product() -> None:
    run = job("telechat2-7b", recompute="full").run
    whole = replace(run, software=replace(run.software, repeats_whole=True))
    more = step_time(whole, MACHINE, RATES).products - step_time(run, MACHINE, RATES).products
    model: ModelConfig = run.model
    last = 2 * run.rows * model.hidden_size * model.ffn_hidden_size
    assert more * PEAK == pytest.approx(run.micro_batches * model.layers * last)


@pytest.mark.parametrize("preset", ["telechat-7b", "telechat2-3b", "telechat3-105b-a4.7b", "tele-flm-52b"])
def test_one_process_has_all_parameters(preset: str) -> None:
    model = ModelConfig(**load_preset(preset))
    count = count_parameters(model)
    biases = sum(prod(shape) for name, shape in parameter_shapes(model).items() if name.endswith("expert_bias"))
    assert sum(held(model, 1, 1, 1)) == count.total + count.next_tokens - biases


@pytest.mark.parametrize(
    ("preset", "parallel"),
    [
        ("telechat2-3b", {"tensor": 2}),
        ("telechat2-115b", {"pipeline": 2, "tensor": 8}),
        ("telechat3-105b-a4.7b", {"tensor": 2, "shards": 4, "expert": 8}),
    ],
)
def test_what_a_process_has_is_what_its_groups_have(preset: str, parallel: dict[str, int]) -> None:
    planned = job(preset, **parallel)
    run: Run = planned.run
    sizes = [0, 0]
    for group in weight_groups(planned):
        sizes[group.of_experts] += group.pieces(1)
    assert list(held(run.model, run.tensor, run.pipeline, run.expert)) == pytest.approx(sizes)
