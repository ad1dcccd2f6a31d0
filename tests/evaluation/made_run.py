"""A run folder as training leaves it, made up, small, and with what a report must survive."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

RECIPE = """name = "first-light"
seed = 0

[model]
vocab_size = 8192
hidden_size = 256
layers = 6

[training]
steps = 400
sequence_length = 512
"""
ATTACK = '</pre><script>alert("x")</script><img src=x onerror=alert(1)>'
START = 1_760_000_000.0


def train_records(steps: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    records = []
    for step in range(1, steps + 1):
        warm = min(1.0, step / 40)
        loss = 2.35 + 6.7 * math.exp(-step / 14) + 2.0 * math.exp(-step / 120) + draw.gauss(0, 0.09)
        speed = 20_500 * (0.35 if step == 1 else 1) + draw.gauss(0, 500)
        records.append(
            {
                "kind": "train",
                "step": step,
                "tokens": step * 4096,
                "loss": loss,
                "learning_rate": 3e-3 * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
                "gradient_norm": 0.4 + 6 * math.exp(-step / 25) + abs(draw.gauss(0, 0.05)) + (8 if step == 231 else 0),
                "tokens_per_second": speed,
                "step_seconds": 4096 / speed,
                "data_seconds": 0.0004,
                "matmul_share": 0.71 + draw.gauss(0, 0.01),
                "time": START + step * 0.2,
            }
        )
    return records


def eval_records(steps: int, every: int = 50) -> list[dict[str, Any]]:
    return [
        {
            "kind": "eval",
            "step": step,
            "tokens": step * 4096,
            "bits_per_byte": 1.36 + 1.5 * math.exp(-step / 90),
            "loss": 2.42 + 2.1 * math.exp(-step / 100),
            "documents": 71,
            "bytes": 600_123,
            "time": START + step * 0.2,
        }
        for step in range(every, steps + 1, every)
    ]


SUMMARY = {
    "model": {"parameters": 7_345_408, "layers": 6, "hidden_size": 256, "heads": 4, "kv_heads": 2},
    "data": {"source": "Python 3.11 standard library", "documents": 1312, "text_bytes": 21_400_000},
    "timing": {"seconds": 287.4, "tokenizer_seconds": 11.2, "training_seconds": 241.0},
    "machine": {"name": "AMD EPYC 7763, 2 cores", "memory_bytes": 8_300_000_000, "torch": "2.13.0"},
    "compressors": [
        {"name": "xz -9e", "bits_per_byte": 1.697, "seen": "nothing but this text"},
        {"name": "zstd -19", "bits_per_byte": 1.722, "seen": "nothing but this text"},
        {"name": "zstd -19 + training text", "bits_per_byte": 1.549, "seen": "8.4 MB of the training text"},
    ],
    "choices": [
        {"name": "chip.name", "value": "cpu", "reason": "no other chip was found"},
        {"name": "chip.precision", "value": "fp32", "reason": "bf16 runs at a quarter of the speed here"},
        {"name": "training.micro_batch", "value": 8, "reason": "the batch takes 1.1 of the 8.3 GB there are"},
        {"name": "chip.compile", "value": True, "reason": "a C++ compiler is here"},
    ],
}

EARLY_CODE = "(self, name):\n    return self._self(name)\n"
CODE = '''(self, size=-1):
        """Read up to size bytes.

        Return an empty bytes object at end of file.
        """
        if size < 0:
            size = self._limit
        while len(self._buffer) < size:
            chunk = self.raw.read(size)
            if not chunk:
                break
            self._buffer += chunk
        return self._buffer[:size]
'''
POEM = "处处闻啼鸟。夜来风雨声，花落知多少。\n中国电信的语言模型，从零开始训练。"


def sample(step: int, prompt: str, text: str, seed: int) -> dict[str, Any]:
    return {"step": step, "prompt": prompt, "text": text, "temperature": 0.8, "seed": seed}


SAMPLES = [
    sample(200, "def read", EARLY_CODE, 0),
    sample(400, "def read", CODE, 0),
    sample(400, "春眠不觉晓，", POEM, 1),
    sample(400, "<b>", ATTACK + "\x1b[31m red", 2),
]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def make_run(folder: Path, steps: int = 400, planned: int = 400, evaluated: bool = True) -> Path:
    """A run of `planned` steps that got as far as `steps`."""
    folder.mkdir(parents=True)
    start = {"kind": "start", "time": START, "parameters": 7_345_408}
    records = [start, *train_records(steps), *(eval_records(steps) if evaluated else [])]
    write_lines(folder / "metrics.jsonl", records)
    write_lines(folder / "samples.jsonl", SAMPLES)
    (folder / "recipe.toml").write_text(RECIPE.replace("400", str(planned)), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    return folder
