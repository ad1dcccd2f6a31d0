"""Runs without data: tokens that are made up, and models of several sizes, for the real trainer on any chip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zili.config import RunConfig, build_config
from zili.data.loader import Batch
from zili.runs.opening import open_trainer
from zili.training.setup import Setup
from zili.training.trainer import Trainer

_SIZES = {"layers": 2, "init_std": 0.06, "vocab_size": 512, "max_length": 128}
DENSE: dict[str, Any] = {
    **_SIZES,
    **{"hidden_size": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn_hidden_size": 256},
    **{"attention_output_bias": True, "ffn_down_bias": True},
}
"""TeleChat2's kinds of operations, grouped heads and biases among them."""
MIXTURE: dict[str, Any] = {
    **_SIZES,
    **{"hidden_size": 128, "heads": 4, "kv_heads": 4, "head_dim": 48, "ffn_hidden_size": 256},
    "latent": {"query_rank": 64, "key_value_rank": 32, "rope_head_dim": 16, "value_head_dim": 32},
    "mixture": {
        **{"experts": 8, "top_k": 2, "ffn_hidden_size": 64, "shared_experts": 1, "dense_layers": 1},
        **{"scoring": "sigmoid", "scale": 2.8, "bias": True, "bias_update_rate": 0.001, "balance_loss": 0.001},
    },
}
"""TeleChat3-105B-A4.7B's: latent attention, routed and shared experts."""


def run_config(model: dict[str, Any], chip: str, *overrides: str, folder: Path = Path("none")) -> RunConfig:
    """A run of `model` on backend `chip`: 4 rows of 64 tokens a step, in fp32 and without compiling."""
    table = {
        "folder": str(folder),
        "model": model,
        "data": {"sources": [{"store": "made up"}], "tokenizer": "none"},
        "training": {"steps": 8, "sequence_length": 64, "global_batch": 4, "micro_batch": 2},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every": 0},
        "chip": {"name": chip, "precision": "fp32", "compile": False},
    }
    return build_config(table, overrides, origin="a made-up run")


def made_up_trainer(config: RunConfig) -> Trainer:
    """The trainer of `config` on its chip, in this process alone."""
    return open_trainer(config, MadeUpTokens(config))


def trainer_of(setup: Setup) -> Trainer:
    return Trainer(setup.config, MadeUpTokens(setup.config), setup.device, world=setup.world)


class MadeUpTokens:
    """`zili.data.loader.Batches` from nowhere: rows that count up in steps of 1 to 4, learned in a few steps."""

    report: list[str] = []  # noqa: RUF012 - nothing is left out
    learned_share = 1.0

    def __init__(self, config: RunConfig) -> None:
        self._rows, self._length = config.training.global_batch, config.training.sequence_length
        self._vocabulary, self._seed = config.model.vocab_size, config.seed

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of step `step`, the same on every machine."""
        draw = torch.Generator().manual_seed(1_000_003 * self._seed + step)
        ranges, shape = ((0, self._vocabulary), (1, 5)), (self._rows, 1)
        first, stride = (torch.randint(*between, shape, generator=draw, device="cpu") for between in ranges)
        tokens = ((first + stride * torch.arange(self._length + 1, device="cpu")) % self._vocabulary)[rows]
        documents = torch.zeros(len(tokens), self._length, dtype=torch.int32, device="cpu")
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents)

    def fingerprint(self) -> str:
        """Everything that the rows depend on."""
        return f"made up: {self._seed} {self._rows} {self._length} {self._vocabulary}"
