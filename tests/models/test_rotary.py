"""Rotary tables against transformers' functions and against the published code's formulas worked by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zili.config.model import ModelConfig, RotaryConfig
from zili.config.presets import load_preset
from zili.models.rotary import frequencies, ntk_alpha, rotary_tables, scaling

LENGTHS = {"original_max_position_embeddings": 2048}
CASES = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, RotaryConfig(rule="linear", factor=3.0, base=5e5)),
    "llama3": (
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **LENGTHS),
        RotaryConfig(rule="llama3", factor=8.0, original_length=2048, base=5e5),
    ),
    "yarn": (
        dict(rope_type="yarn", factor=4.0, **LENGTHS),
        RotaryConfig(rule="yarn", factor=4.0, original_length=2048, base=5e5),
    ),
}


@pytest.mark.parametrize("rule", CASES)
def test_frequencies_are_transformers(rule):
    rope, ours = CASES[rule]
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": 5e5, **rope},
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS[rule](config, device="cpu")
    base, ours_magnitude = scaling(ours, 128, 100)
    torch.testing.assert_close(frequencies(ours, 128, base), expected, rtol=1e-6, atol=0)
    assert ours_magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize(
    ("length", "alpha"),
    [(1, 1), (4096, 1), (8192, 1), (8193, 3), (16384, 3), (16385, 7), (32768, 7), (32769, 15), (65536, 15)],
)
def test_alpha_jumps_at_doublings(length, alpha):
    assert ntk_alpha(length, 8192) == alpha


def test_telechat_7b_never_runs_at_its_nominal_base():
    config = ModelConfig(**load_preset("telechat-7b"))
    for length in (1, 500, 8192):
        base, magnitude = scaling(config.rotary, config.head_dim, length)
        assert base == pytest.approx(30_528, abs=1)
        assert magnitude == 1.0


def test_telechat_magnitude_grows_past_the_training_length():
    rotary = RotaryConfig(rule="telechat_ntk", original_length=16, training_length=16)
    assert scaling(rotary, 12, 16) == (10_000.0, 1.0)
    base, magnitude = scaling(rotary, 12, 56)
    assert base == pytest.approx(10_000 * 7 ** (12 / 10))
    assert magnitude == pytest.approx(1 + 0.1 * math.log(56 / 16))


def test_telechat_tables_are_rounded_to_half_and_multiplied_in_half():
    rotary = RotaryConfig(rule="telechat_ntk", original_length=16, training_length=16)
    positions = torch.arange(56)
    base, magnitude = scaling(rotary, 12, 56)
    cos, sin = rotary_tables(rotary, 12, positions, 56)
    angles = positions[:, None] * (1.0 / base ** (torch.arange(0, 12, 2) / 12)).repeat(2)
    assert torch.equal(cos, (angles.cos().half() * magnitude).float())
    assert torch.equal(sin, (angles.sin().half() * magnitude).float())
    assert cos.dtype == torch.float32
    assert not torch.equal(cos, angles.cos() * magnitude)


def test_tele_flm_scales_the_base_alone():
    rotary = RotaryConfig(rule="tele_flm_ntk", original_length=4096)
    assert scaling(rotary, 128, 4096) == (10_000.0, 1.0)
    assert scaling(rotary, 128, 4097) == (30_000.0, 1.0)
    assert scaling(rotary, 128, 9000) == (70_000.0, 1.0)


def test_telechat3_magnitude_is_its_own_not_yarns():
    config = ModelConfig(**load_preset("telechat3-36b"))
    assert scaling(config.rotary, 128, 10).magnitude == pytest.approx(1.0970, abs=5e-5)
    yarn = config.rotary.model_copy(update={"rule": "yarn"})
    assert scaling(yarn, 128, 10).magnitude == pytest.approx(1.1386, abs=5e-5)


def test_an_attention_factor_in_the_config_wins():
    rotary = RotaryConfig(rule="yarn", factor=4.0, original_length=64, attention_factor=1.25)
    cos, _ = rotary_tables(rotary, 8, torch.arange(3), 3)
    assert torch.equal(cos[0], torch.full((8,), 1.25))


def test_tables_of_a_part_are_rows_of_the_whole():
    rotary = RotaryConfig(rule="telechat_ntk", original_length=16, training_length=16)
    whole = rotary_tables(rotary, 12, torch.arange(40), 40)
    part = rotary_tables(rotary, 12, torch.arange(30, 40), 40)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[30:], b)
