"""Pairs of answers for recipes/dpo-demo.toml: what is right beside what a tuned model says wrongly.

    python benchmarks/sft_demo/pairs.py runs/sft-demo runs/tasks/train.jsonl runs/pairs.jsonl

asks the model each question once, at temperature 1. Questions it answers rightly make no pair.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from zili.data.dialogues import read_dialogues
from zili.serving.generate.generation import Sampling, generate
from zili.serving.model_folder import open_folder


def main(model: Path, talks: Path, out: Path) -> None:
    opened = open_folder(model)
    assert opened.dialect is not None, f"{model} has no chat template"
    stops = opened.dialect.end_ids
    pairs = []
    for number, dialogue in enumerate(read_dialogues([talks])):
        *asked, known = dialogue.messages
        prompt = opened.dialect.render(asked, add_generation_prompt=True).ids
        sampling = Sampling(temperature=1.0, seed=number)
        said = opened.tokenizer.decode(
            list(generate(opened.model, prompt, max_new_tokens=32, sampling=sampling, stop_ids=stops))
        ).strip()
        if said and said != known["content"].strip():
            pairs.append({"prompt": asked, "chosen": known["content"], "rejected": said})
    out.write_text("".join(f"{json.dumps(pair, ensure_ascii=False)}\n" for pair in pairs), encoding="utf-8")
    print(f"{out}: {len(pairs)} pairs of {number + 1} questions")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
