"""Small twins of the published shapes."""

from __future__ import annotations

import pytest

from zili.config import ModelConfig, build_config, load_preset, preset_names
from zili.config.scaling import scaled_down
from zili.errors import ConfigError
from zili.models.arithmetic import count_parameters

SIZES = {"hidden_size", "ffn_hidden_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size", "mixture", "latent"}


@pytest.mark.parametrize("name", preset_names())
def test_a_twin_keeps_what_is_no_size_and_fits_eight_processes(name: str) -> None:
    whole = ModelConfig.model_validate(load_preset(name))
    twin = scaled_down(whole, 64)
    assert twin.model_dump(exclude=SIZES) == whole.model_dump(exclude=SIZES)
    assert (twin.mixture is None, twin.latent is None) == (whole.mixture is None, whole.latent is None)
    assert (twin.hidden_size, twin.layers, twin.heads) == (64, 4, 8) and twin.kv_heads % 2 == 0
    assert twin.ffn_hidden_size / 64 == pytest.approx(whole.ffn_hidden_size / whole.hidden_size, rel=0.2)
    if twin.mixture and whole.mixture:
        assert twin.mixture.scoring == whole.mixture.scoring and twin.mixture.experts == 8
    assert count_parameters(twin).total < 3_000_000


def test_a_recipe_asks_for_a_twin_and_its_own_keys_win() -> None:
    table = {
        "model": {"preset": "telechat2-115b", "scaled_to": 64, "vocab_size": 500},
        "data": {"sources": [{"store": "corpus"}], "tokenizer": "tokenizer"},
        "training": {"steps": 1},
    }
    model = build_config(table, origin="a test").model
    assert (model.hidden_size, model.vocab_size, model.rotary.rule) == (64, 500, "telechat_ntk")


@pytest.mark.parametrize("size", [0, 20, "small", 72])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    table = {"model": {"preset": "telechat2-115b", "scaled_to": size}}
    with pytest.raises(ConfigError, match=r"model\.scaled_to.*multiple of 16"):
        build_config(table, origin="a test")
