"""How fast the trainer is on a chip, beside transformers' Llama of the same shape: tokens/s and MFU."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from zili import chips
from zili.chips.device import Device
from zili.chips.host_memory import available_bytes
from zili.config import RunConfig
from zili.config.model import ModelConfig
from zili.config.run import Precision
from zili.data.loader import Batch
from zili.diagnosis.findings import Finding, Severity
from zili.diagnosis.made_up_runs import made_up_trainer, run_config
from zili.models.arithmetic import training_flops_per_token, training_state_bytes
from zili.models.decoder import Decoder
from zili.ops.yardstick import first_line
from zili.release.layouts.layout import Variant
from zili.release.layouts.llama import Llama
from zili.release.layouts.mapping import PublishedTensors
from zili.release.tensors import HeldTensors
from zili.training.throughput import matmul_peak
from zili.training.trainer import DTYPES

_SIZES = ("hidden_size", "layers", "heads", "kv_heads", "ffn_hidden_size", "vocab_size")
_SHAPES = (
    ((256, 4, 4, 2, 704, 8192), 256, 4),
    ((768, 12, 12, 4, 2048, 32768), 1024, 4),
    ((2048, 16, 32, 8, 5632, 65536), 4096, 8),
)
"""Sizes of models, tokens of a sequence, sequences of a step. The largest that is quick enough and fits is taken."""
_HEAD = 64
_STEP_SECONDS, _EXPECTED_SHARE, _ROOM = 1.5, 0.3, 0.4
_SECONDS, _MOST_STEPS, _WARM_UP = 8.0, 30, 3
_LEARNING_RATE = 3e-4
Step = Callable[[Tensor], float]
"""Takes tokens `[B, S + 1]`, does one optimizer step on them, returns the loss."""


def _throughput(compiled: bool) -> Callable[[str, Callable[[Finding], None]], None]:
    """Tokens/s of a dense model; eager beside transformers, or with blocks compiled."""

    def timed(chip: str, note: Callable[[Finding], None]) -> None:
        device = Device(chips.activate(chips.choose(chip).backend))
        if compiled and not (can := device.capability("compile")).value:
            note(Finding("throughput", "zili, compiled", Severity.FALLBACK, f"not tried: {can.reason}"))
            return
        precision: Precision = "bf16" if device.capability("bf16").value else "fp32"
        reached = matmul_peak(device, DTYPES[precision])
        chosen = (f"chip.precision={precision}", f"chip.compile={str(compiled).lower()}")
        config = _fitting(device, reached, *chosen)
        ours, first = _timed(_ours(config), config)
        note(_finding(f"zili, {'compiled' if compiled else 'eager'}", config, device, reached, ours))
        if not compiled:
            note(_beside(config, device, reached, ours, first))

    return timed


eager, compiled = _throughput(False), _throughput(True)


def _fitting(device: Device, reached: float, *chosen: str) -> RunConfig:
    """The largest shape whose step is quick at a usual share of `reached` FLOP/s, and whose model fits twice."""
    memory = device.memory()
    room = memory["free"] if memory else available_bytes()
    for sizes, length, rows in reversed(_SHAPES):
        model = {**dict(zip(_SIZES, sizes, strict=True)), "head_dim": _HEAD, "max_length": length}
        batch = (f"training.sequence_length={length}", f"training.global_batch={rows}", "training.micro_batch=auto")
        rate = f"optimizer.learning_rate={_LEARNING_RATE}"
        config = run_config(model, device.backend.name, *batch, rate, *chosen)
        flops = rows * length * training_flops_per_token(config.model, length)
        fits = room is None or training_state_bytes(config.model).total <= _ROOM * room
        if fits and flops <= _STEP_SECONDS * _EXPECTED_SHARE * reached:
            break
    return config


def _finding(name: str, config: RunConfig, device: Device, reached: float, seconds: float) -> Finding:
    length, rows = config.training.sequence_length, config.training.global_batch
    flops = rows * length * training_flops_per_token(config.model, length) / seconds
    figure = device.chip.figure(f"{config.chip.precision}_tflops") if device.chip else None
    seen = (
        f"{rows * length / seconds:,.0f} tokens/s in {config.chip.precision}, hidden {config.model.hidden_size}, "
        f"{config.model.layers} layers, {rows} rows of {length}; {flops / reached:.1%} of what a product reaches"
    )
    figures = {"tokens/s": rows * length / seconds, "FLOP/s": flops, "of a product": flops / reached}
    if figure is not None:
        figures["MFU"] = flops / (1e12 * figure.value)
        seen += f", MFU {figures['MFU']:.1%} of {figure.value:g} TFLOP/s"
    return Finding("throughput", name, Severity.GOOD, seen, figures=figures)


def _beside(config: RunConfig, device: Device, reached: float, ours: float, first: float) -> Finding:
    """transformers' model from the same weights on the same tokens."""
    name = "transformers, eager"
    # Its call of torch's attention asks for grouped heads; its own formula repeats them.
    attention = "sdpa" if device.capability("grouped_heads_attention").value else "eager"
    try:
        step = transformers_step(config.model, device.torch, str(config.chip.precision), attention)
        theirs, loss = _timed(step, config)
    except Exception as error:  # not installed, not for this plugin, or out of memory: not the chip's fault
        return Finding("throughput", name, Severity.FALLBACK, f"not compared: {first_line(error)}")
    found = _finding(name, config, device, reached, theirs)
    apart = abs(loss / first - 1)
    seen = f"{found.seen}, {attention} attention; zili is {theirs / ours:.2f} times as fast"
    seen += f"; first losses {apart:.1e} apart"
    return Finding("throughput", name, Severity.GOOD, seen, figures={**found.figures, "zili over it": theirs / ours})


def _timed(step: Step, config: RunConfig) -> tuple[float, float]:
    """Seconds of the middle step, and the loss of the first, on the same tokens for everyone."""
    draw = torch.Generator().manual_seed(0)
    shape = (config.training.global_batch, config.training.sequence_length + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=draw)
    first, *_ = [step(tokens) for _ in range(_WARM_UP)]
    seconds: list[float] = []
    while len(seconds) < 2 or (sum(seconds) < _SECONDS and len(seconds) < _MOST_STEPS):
        started = time.perf_counter()
        step(tokens)  # the loss is read, so everything is done
        seconds.append(time.perf_counter() - started)
    return median(seconds), first


def _ours(config: RunConfig) -> Step:
    trainer = made_up_trainer(config)
    trainer.parallel.train()

    def step(tokens: Tensor) -> float:
        documents = torch.zeros(len(tokens), tokens.shape[1] - 1, dtype=torch.int32)
        loss, _ = trainer.train_step(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents))
        return float(loss)

    return step


def transformers_step(config: ModelConfig, device: torch.device, precision: str, attention: str = "sdpa") -> Step:
    """A plain loop over LlamaForCausalLM as it comes: `attention` by its name there, fused AdamW, foreach clipping,
    autocast.

    Raises:
        ImportError: transformers is not installed.
    """
    library: Any = importlib.import_module("transformers")
    model = library.LlamaForCausalLM(
        library.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rotary.base,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation=attention,
        )
    )
    model.load_state_dict(_llama_names(config))
    model.to(device).train()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) is wide] for wide in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(tokens: Tensor) -> float:
        tokens = tokens.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=tokens[:, :-1]).logits
        # Labels already shifted, so that both sides predict the same S targets.
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _llama_names(config: ModelConfig) -> dict[str, Tensor]:
    """The weights our trainer starts from, as the Llama layout publishes them."""
    layout = Llama()
    published = PublishedTensors(
        HeldTensors(Decoder(config).state_dict()), layout.rules(config, Variant(layout.prefix))
    )
    return {name: published.read(name) for name in published.describe()}
