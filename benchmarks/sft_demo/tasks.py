"""Questions with one right answer, made by reasoning-gym, as conversations: for recipes/sft-demo.toml.

    pip install reasoning-gym
    python benchmarks/sft_demo/tasks.py FOLDER

writes FOLDER/train.jsonl, and a file of each kind in FOLDER/held_out. No question of these is in train.jsonl. They are
generated, and no benchmark.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import reasoning_gym

TRAIN, HELD_OUT = 500, 50
"""Of each kind."""
KINDS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "letter_counting": {"min_words": 2, "max_words": 3},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}


def made(kind: str, size: int, seed: int) -> dict[str, str]:
    """Answers by question; one that came twice is there once."""
    data = reasoning_gym.create_dataset(kind, size=size, seed=seed, **KINDS[kind])
    return {item["question"]: str(item["answer"]) for item in data}


def write(path: Path, answers: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    roles = ("user", "assistant")
    talks = (
        [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)] for pair in answers.items()
    )
    lines = (json.dumps({"messages": talk}, ensure_ascii=False) for talk in talks)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(answers)} questions")


def main(folder: Path) -> None:
    learned: dict[str, str] = {}
    for kind in KINDS:
        held_out = made(kind, HELD_OUT, seed=2)
        write(folder / "held_out" / f"{kind}.jsonl", held_out)
        learned |= {question: answer for question, answer in made(kind, TRAIN, 1).items() if question not in held_out}
    write(folder / "train.jsonl", learned)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
