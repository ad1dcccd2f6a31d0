"""Counts against published totals, against the built model, and FLOPs against torch's own counter."""

import subprocess
import sys
from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zili.config.model import ModelConfig
from zili.config.presets import load_preset, preset_names
from zili.errors import ConfigError
from zili.models.arithmetic import (
    count_parameters,
    forward_flops_per_token,
    matmul_parameters,
    parameter_shapes,
    training_flops_per_token,
    training_state_bytes,
)
from zili.models.decoder import Decoder
from zili.objectives import learner

# Index files' total_size over the stored bytes a parameter; 52B's less its 64 masked_bias scalars.
PUBLISHED = {
    "telechat-7b": 14_400_036_864 // 2,
    "telechat-12b": 24_772_864_000 // 2,
    "telechat-52b": 105_665_020_032 // 2 - 64,
    "telechat2-3b": 3_070_528_512,
    "telechat2-7b": 7_617_351_680,
    "telechat2-35b": 35_435_059_200,
    "telechat2-115b": 453_131_665_408 // 4,
    "telechat3-36b": 36_239_579_136,
    # Only the vocabulary differs from TeleChat-52B: 80,384 rows for 80,896, in and out.
    "tele-flm-52b": 105_665_020_032 // 2 - 64 - 2 * (80_896 - 80_384) * 8192,
    "tele-flm-1t": 1_083_813_908_480,
    # The published total leaves out the biases of 30 attention outputs and the final norm.
    "telechat2-39b-a12b": 39_328_006_144 + 30 * 4096 + 4096,
    "telechat3-105b-a4.7b": 102_256_318_208,
    # Ours; the sum is written out in the preset.
    "zili-1t-a32b": 1_008_879_105_152,
}
ACTIVE = {
    "telechat2-39b-a12b": 12_148_916_224 + 30 * 4096 + 4096,
    "telechat3-105b-a4.7b": 4_675_835_648,
    "zili-1t-a32b": 31_891_485_824,
}


def preset(name, **changes):
    return ModelConfig(**{**load_preset(name), **changes})


def small(name):
    """The preset's ratios and switches at a size that builds anywhere."""
    full = preset(name)
    group = full.heads // full.kv_heads
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "layers": 3,
        "heads": 2 * group,
        "kv_heads": 2,
        "head_dim": 6,
    }
    if full.mixture:
        sizes["mixture"] = {**full.mixture.model_dump(), "experts": 8, "top_k": 2, "ffn_hidden_size": 24}
    if full.latent:
        sizes["latent"] = {"query_rank": 20, "key_value_rank": 12, "rope_head_dim": 2, "value_head_dim": 5}
    return preset(name, ffn_hidden_size=40, **sizes)


def test_every_published_shape_has_a_preset():
    assert preset_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    assert count_parameters(preset(name)).total == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_built_model(name):
    config = small(name)
    with torch.device("meta"):
        decoder = learner(config)
    built = {name: tuple(tensor.shape) for name, tensor in decoder.named_tensors()}
    assert built == parameter_shapes(config)
    count = count_parameters(config)
    assert count.total + count.next_tokens == sum(prod(shape) for shape in built.values())
    assert all(tensor.is_meta for _, tensor in decoder.named_tensors())


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_the_published_ones(name):
    assert count_parameters(preset(name)).active == ACTIVE[name]


def test_the_layer_of_multi_token_prediction_is_what_the_published_name_counts_in():
    count = count_parameters(preset("telechat3-105b-a4.7b"))
    # One more layer with experts, a projection of two hidden states, three norms.
    layer = parameter_shapes(preset("telechat3-105b-a4.7b", mtp_layers=0))
    block = sum(prod(shape) for name, shape in layer.items() if name.startswith("layers.44."))
    assert count.next_tokens == block + 2 * 2560**2 + 3 * 2560
    assert round((count.total + count.next_tokens) / 1e9) == 105


def test_the_trillion_divides_over_many_processes():
    config = preset("zili-1t-a32b")
    state = training_state_bytes(config)
    assert (round(state.weights / 1e9), round(state.total / 1e9)) == (4104, 16417)
    assert round(training_flops_per_token(config, 4096) / 1e8) == 2008
    sizes = (config.heads, config.mixture.experts, config.mixture.ffn_hidden_size, config.hidden_size)
    assert all(size % 64 == 0 for size in (*sizes, config.vocab_size))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'telechat2-7B'.*did you mean 'telechat2-7b'"):
        load_preset("telechat2-7B")
    with pytest.raises(ConfigError, match="known presets: tele-flm-1t"):
        load_preset("###")


def test_planning_needs_no_torch():
    program = """
import sys
sys.modules["torch"] = None  # importing it now fails
import zili.models
from zili.config.model import ModelConfig
from zili.config.presets import load_preset
from zili.models.arithmetic import count_parameters
assert count_parameters(ModelConfig(**load_preset("telechat2-3b"))).total == 3_070_528_512
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", ["telechat-7b", "telechat2-115b"])
def test_flops_agree_with_torchs_counter(name):
    config, batch, sequence = small(name), 2, 16
    decoder = Decoder(config)
    ids = torch.randint(config.vocab_size, (batch, sequence))
    with FlopCounterMode(display=False) as counter:
        loss = decoder.eval().loss_sum(ids, ids)
        forward = counter.get_total_flops()
        loss.backward()
    tokens = batch * sequence
    # Matrix products exactly; attention is counted as if nothing were masked, or not at all on the CPU.
    products = sum(
        flops
        for operation, flops in counter.get_flop_counts()["Global"].items()
        if operation is torch.ops.aten.mm or operation is torch.ops.aten.addmm
    )
    assert products == 6 * matmul_parameters(config) * tokens
    attention = 2 * config.layers * sequence * config.heads * config.head_dim
    assert forward_flops_per_token(config, sequence) == 2 * matmul_parameters(config) + attention
    assert training_flops_per_token(config, sequence) == 3 * forward_flops_per_token(config, sequence)
    unmasked = forward - 2 * matmul_parameters(config) * tokens
    assert unmasked in (0, 2 * attention * tokens)


def test_state_bytes_of_mixed_precision_adamw_are_sixteen_a_parameter():
    config = small("telechat2-7b")
    total = count_parameters(config).total
    plain = training_state_bytes(config)
    assert (plain.weights, plain.gradients, plain.optimizer) == (4 * total, 4 * total, 8 * total)
    assert plain.total == 16 * total


def test_muon_keeps_one_moment_for_the_matrices_of_the_blocks():
    config = small("telechat2-7b")
    matrices = [shape for name, shape in parameter_shapes(config).items() if "layers" in name and len(shape) == 2]
    saved = 4 * sum(map(prod, matrices))
    both = training_state_bytes(config), training_state_bytes(config, optimizer="muon")
    assert both[0].optimizer - both[1].optimizer == saved
