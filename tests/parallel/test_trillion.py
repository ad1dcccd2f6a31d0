"""Both models of a trillion parameters train in every kind of layout, as their small twins."""

from __future__ import annotations

import pytest
from tiny_models import BOUND, Kind, Layout, Row, Runs, slow

LAYOUTS = {
    "tele-flm-1t": ["shards=2", "tensor=2", "context=2", "pipeline=2", "shards=2 tensor=2 pipeline=2"],
    "zili-1t-a32b": [
        *("shards=2 expert=2", "tensor=2", "context=2", "pipeline=2 schedule=zero_bubble"),
        "shards=2 tensor=2 pipeline=2 expert=4",
    ],
}


@pytest.mark.parametrize(
    ("kind", "layout"), [slow(kind, Layout(text)) for kind, texts in LAYOUTS.items() for text in texts]
)
def test_a_trillions_twin_has_one_curve(kind: Kind, layout: Layout, runs: Runs, request: pytest.FixtureRequest) -> None:
    Row.of(layout, layout.world, kind, runs.alone(kind), runs.on(layout, kind), BOUND).check(request)
