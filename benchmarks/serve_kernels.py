"""The parts of an engine's step on a CPU: our kernels, and the libraries' operations in their place.

    python benchmarks/serve_kernels.py

SmolLM2-135M's shapes in fp32, every weight and key from memory. All take turns; medians of the turns, in milliseconds
for a step: `products` those of 30 layers and the output matrix, `attention` that of 30 layers to 160 tokens each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from zili.config.model import ModelConfig
from zili.serving.cpu.kernels import Kernels, compiled
from zili.serving.cpu.packed import CompiledLinear, PackedLinear

LAYERS, HIDDEN, FEED_FORWARD, VOCABULARY = 30, 576, 1536, 49152
HEADS, KV_HEADS, SIZE, CONTEXT, SEEN, SLOTS = 9, 3, 64, 1024, 160, 16
SHAPES = ((HIDDEN, (HEADS + 2 * KV_HEADS) * SIZE), (HIDDEN, HIDDEN), (HIDDEN, 2 * FEED_FORWARD), (FEED_FORWARD, HIDDEN))
TURNS = 9


def main() -> None:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=SIZE,
        ffn_hidden_size=FEED_FORWARD,
    )
    kernels = compiled(config, torch.float32)
    if kernels is None:
        raise SystemExit("nothing to compare")
    with torch.no_grad():
        products(kernels)
        attention(kernels)


def products(kernels: Kernels) -> None:
    weights = [torch.randn(out, width) * 0.02 for width, out in SHAPES * LAYERS] + [torch.randn(VOCABULARY, HIDDEN)]
    ours = [CompiledLinear(weight, None, kernels) for weight in weights]
    theirs = [PackedLinear(weight, None) for weight in weights]
    for rows in (1, 4, 16, 32, 512):
        x = {width: torch.randn(1, rows, width) for width in (HIDDEN, FEED_FORWARD)}

        def each(layers: list, x: dict[int, Tensor] = x) -> None:
            for layer, weight in zip(layers, weights, strict=True):
                layer(x[weight.shape[1]])

        race(
            f"products, {rows} rows",
            {
                "ours": lambda each=each: each(ours),
                "oneDNN, laid out ahead": lambda each=each: each(theirs),
                "torch": lambda each=each, x=x: [F.linear(x[weight.shape[1]], weight) for weight in weights],
            },
        )


def attention(kernels: Kernels) -> None:
    keys, values = (torch.randn(LAYERS, SLOTS, KV_HEADS, CONTEXT, SIZE) for _ in range(2))
    for tokens in (1, 4, 16):
        query = torch.randn(tokens, HEADS, SIZE)
        positions = torch.full((tokens,), SEEN - 1)
        first = (torch.arange(tokens)[:, None] * KV_HEADS + torch.arange(KV_HEADS)).flatten() * CONTEXT
        rows, mask = first + SEEN - 1, torch.zeros(tokens, 1, 1, SEEN)

        def ours(query: Tensor = query, positions: Tensor = positions, rows: Tensor = rows) -> None:
            for layer in range(LAYERS):
                kernels.attend(query, positions, rows, keys[layer], values[layer])

        def torchs(query: Tensor = query, tokens: int = tokens, mask: Tensor = mask) -> None:
            for layer in range(LAYERS):
                seen = (kept[layer, :tokens, :, :SEEN] for kept in (keys, values))
                F.scaled_dot_product_attention(query.unflatten(1, (KV_HEADS, -1)), *seen, attn_mask=mask)

        race(f"attention, {tokens} tokens", {"ours": ours, "torch": torchs})


def race(what: str, runners: dict[str, Callable[[], object]]) -> None:
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(TURNS):
        for name, run in runners.items():
            began = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - began) * 1e3)
    told = (f"{name} {median(times[1:]):.1f} ms" for name, times in taken.items())
    print(f"{what:22}", ", ".join(told), flush=True)


if __name__ == "__main__":
    main()
