"""Questions that are made here, with no network: machinery is tried with them, and they are no benchmark.

lm-eval loads this file from the task files beside it; each function gives the splits of a task.
"""

import random

import datasets

_SIZE = 200
_WORDS = [
    "red",
    "blue",
    "green",
    "tree",
    "river",
    "stone",
    "cloud",
    "light",
    "paper",
    "glass",
    "山",
    "水",
    "火",
    "木",
    "天",
    "地",
    "人",
    "书",
    "车",
    "门",
]


def arithmetic(**_):
    """Sums and differences of numbers below 100, four choices."""
    draw = random.Random(1)
    rows = []
    for _number in range(_SIZE):
        one, other, sign = draw.randint(0, 99), draw.randint(0, 99), draw.choice("+-")
        right = one + other if sign == "+" else one - other
        wrong = draw.sample([right + step for step in range(-9, 10) if step], 3)
        choices = [str(number) for number in (right, *wrong)]
        draw.shuffle(choices)
        rows.append({"question": f"{one} {sign} {other} =", "choices": choices, "answer": choices.index(str(right))})
    return _splits(rows)


def order(**_):
    """Which of two numbers is larger, in English and Chinese, two choices."""
    draw = random.Random(2)
    rows = []
    for number in range(_SIZE):
        one, other = draw.sample(range(1000), 2)
        asked = f"Which is larger, {one} or {other}? Answer:" if number % 2 else f"{one}和{other}哪个更大？答案："
        rows.append({"question": asked, "choices": [str(one), str(other)], "answer": int(other > one)})
    return _splits(rows)


def copy(**_):
    """A list of words to repeat."""
    draw = random.Random(3)
    rows = []
    for _number in range(_SIZE // 2):
        words = " ".join(draw.choices(_WORDS, k=draw.randint(2, 5)))
        rows.append({"question": f"Repeat: {words}\nAnswer:", "answer": words})
    return _splits(rows)


def _splits(rows):
    cut = len(rows) // 5
    return {"train": datasets.Dataset.from_list(rows[:cut]), "test": datasets.Dataset.from_list(rows[cut:])}
