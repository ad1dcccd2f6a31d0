"""Direct preference optimisation: its loss against torch's own, the same curve in every layout, the same promise."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from many import curve_of, on_processes, open_trainer
from tiny_models import BOUND, Kind, Layout, Row, Runs, slow

from zili.cli.launch import begin
from zili.config import RunConfig
from zili.data.chat import ChatTemplate
from zili.data.dialogue_store import build_dialogue_store
from zili.data.dialogues import Dialogue
from zili.data.packing import DialogueLoader
from zili.data.sources import Census
from zili.data.tokenizer import Tokenizer
from zili.errors import CheckpointError
from zili.models.decoder import Decoder
from zili.ops import IGNORE_INDEX
from zili.training.callbacks import Callback, StepRecord
from zili.training.reference import REFERENCE_FILE
from zili.training.trainer import Trainer

BETA = 0.3


@pytest.fixture(scope="session")
def pairs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Overrides that make a run of the tiny models one on pairs: polite answers are chosen."""
    draw, words = random.Random(0), ["the", "model", "trains", "on", "what", "it", "said", "and", "asks", "for", "more"]

    def line(most: int = 5) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    talks = []
    for number in range(200):
        before = [{"role": role, "content": line(3)} for role in ("user", "assistant")] if number % 3 == 0 else []
        asked, answer = [*before, {"role": "user", "content": line()}], line(3)
        chosen, rejected = ([*asked, {"role": "assistant", "content": f"{answer}{end}"}] for end in (" please", " no"))
        talks.append(Dialogue(chosen, None, f"pair {number}", rejected))
    prefix = tmp_path_factory.mktemp("pairs") / "pairs"
    tokenizer = Tokenizer.from_folder(tiny_data / "tokenizer")
    build_dialogue_store(talks, tokenizer, ChatTemplate.named("telechat2"), prefix, census=Census())
    return f"data.sources=[{{store='{prefix}'}}]"


@pytest.fixture(scope="session")
def begun(runs: Runs) -> dict[str, tuple[str, ...]]:
    """Of each kind the overrides that start from a model of it that has learned a little."""
    found: dict[str, tuple[str, ...]] = {}
    for kind in ("dense", "mixture"):
        config = runs.recipe(kind, "training.steps=2")
        curve_of(config, 1)
        found[kind] = (f"training.start_from={config.folder}", f"preference.beta={BETA}", "training.sequence_length=128")
    return found


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (Layout("shards=2"), "dense"),
        slow(Layout("tensor=2"), "dense"),
        slow(Layout("context=2"), "dense"),
        slow(Layout("pipeline=2"), "dense"),
        slow(Layout("pipeline=2 schedule=zbv"), "dense"),
        slow(Layout("shards=2 expert=2"), "mixture"),
        slow(Layout("tensor=2 context=2"), "mixture"),
        slow(Layout("pipeline=2"), "mixture"),
    ],
)
def test_a_layout_has_the_curve_of_one_process(
    layout: Layout,
    kind: Kind,
    pairs: str,
    begun: dict[str, tuple[str, ...]],
    runs: Runs,
    request: pytest.FixtureRequest,
) -> None:
    one, other = runs.alone(kind, pairs, *begun[kind]), runs.on(layout, kind, pairs, *begun[kind])
    Row.of(f"{layout}, preferences", layout.world, kind, one, other, 2e-4, 2e-3).check(request)
    assert one.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert one.losses[-1] < one.losses[0] - 0.1
