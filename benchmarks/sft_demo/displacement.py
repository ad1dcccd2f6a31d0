"""What `preference.likelihood` is for, on a model so small that it takes a few minutes: the table in docs/assistant.md.

    python benchmarks/sft_demo/displacement.py FOLDER

A model learns two answers to each question, "blue" and the right one; then, from pairs, which of them is wanted.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from zili.config.model import ModelConfig
from zili.data.tokenizer import Tokenizer
from zili.models.decoder import Decoder
from zili.release.native import write_native
from zili.release.tensors import HeldTensors

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}
RECIPE = """
folder = "{folder}"
model = {{ folder = "{root}/base" }}
data = {{ sources = [{{ store = "{root}/{data}/train" }}], tokenizer = "{root}/{data}/tokenizer" }}
training = {{ start_from = "{start}", steps = {steps}, sequence_length = 64, global_batch = 4 }}
optimizer = {{ learning_rate = {rate} }}
chip = {{ compile = false, operations = {{ linear = "reference", attention = "reference" }} }}
"""


def zili(*words: object) -> str:
    command = [sys.executable, "-m", "zili", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def write(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")


def train(root: Path, name: str, more: str = "", **settings: object) -> None:
    folder, recipe = root / name, root / f"{name}.toml"
    recipe.write_text(RECIPE.format(root=root, folder=folder, **settings) + more, encoding="utf-8")
    zili("train", recipe)
    answered = json.loads(zili("eval", folder, "--answers", root / "asked.jsonl", "--json"))["scores"][0]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [record for record in records if record["kind"] == "train"][-1]
    figures = [f"{last[key]:+.2f}" for key in ("reward_chosen", "reward_rejected") if key in last]
    print(f"{name:<18} {answered['share']:7.1%} exact  {answered['loss']:.4f} nats/token  {' '.join(figures)}")


def main(root: Path) -> None:
    root.mkdir(parents=True)
    texts = [f"What is the colour of {thing}? {colour}" for thing, colour in COLOURS.items()]
    tokenizer, base = Tokenizer.train(texts, 290), root / "base"
    config = ModelConfig(
        vocab_size=304, hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn_hidden_size=128, max_length=64
    )
    base.mkdir()
    write_native(base, config, None, HeldTensors(Decoder(config).state_dict()), 10**9)
    tokenizer.save(base)
    draw = random.Random(0)
    asked = [draw.choice(list(COLOURS)) for _ in range(60)]
    questions = [{"role": "user", "content": f"What is the colour of {thing}?"} for thing in asked]
    right = [COLOURS[thing] for thing in asked]
    talks = [
        {"messages": [question, {"role": "assistant", "content": answer}]}
        for answers in (right, ["blue"] * len(right))
        for question, answer in zip(questions, answers, strict=True)
    ]
    write(root / "asked.jsonl", talks[: len(right)])
    write(root / "both.jsonl", talks)
    write(
        root / "pairs.jsonl",
        [
            {"prompt": [question], "chosen": answer, "rejected": "green" if answer == "blue" else "blue"}
            for question, answer in zip(questions, right, strict=True)
        ],
    )
    for name in ("both", "pairs"):
        zili("dialogues", root / f"{name}.jsonl", "--model", base, "--to", root / name)
    train(root, "tuned", data="both", start=base, steps=120, rate=3e-3)
    for likelihood in (0.0, 0.2):
        more = f"preference = {{ likelihood = {likelihood} }}\n"
        train(root, f"likelihood {likelihood}", more, data="pairs", start=root / "tuned", steps=60, rate=1e-3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
