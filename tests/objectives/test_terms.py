"""What an objective of one's own may give, and what is said where it gives something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zili
from zili.objectives.objective import checked_terms

NONE: Any = None
ONE = torch.ones((), requires_grad=True)
COUNT = torch.tensor(3)


class Gives(zili.Objective):
    figures = ("sure",)

    def __init__(self, given: object) -> None:
        self.given = given

    def terms(self, outputs: zili.Outputs, batch: zili.Batch, peers: zili.Peers) -> Any:
        return self.given


def terms(loss: Any = ONE, figure: Any = COUNT, count: Any = COUNT) -> zili.Terms:
    return zili.Terms(loss, {"sure": figure}, count)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (ONE, r"Gives.terms gives Tensor; return zili.Terms\(loss, figures, count\)"),
        (None, "Gives.terms gives NoneType; return"),
        (zili.Terms(ONE, {}, COUNT), r"the figures \[\], and `figures` names \['sure'\]; they must be the same"),
        (terms(loss=torch.ones(2, 3, requires_grad=True)), r"loss has the shape \[2, 3\]; give a 0-d tensor, a sum"),
        (terms(figure=0.5), "sure is float; give a 0-d tensor"),
        (terms(count=12), "count is int; give a 0-d tensor"),
        (terms(loss=torch.ones(())), "loss has no gradient; make it of what `outputs` gives"),
    ],
)
def test_what_cannot_be_added_up_or_differentiated_is_refused(given: object, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        checked_terms(Gives(given), NONE, NONE, NONE)


@pytest.mark.parametrize("figure", [COUNT, ONE])
def test_whole_numbers_and_figures_with_a_gradient_are_taken(figure: Tensor) -> None:
    given = terms(figure=figure)
    assert checked_terms(Gives(given), NONE, NONE, NONE) is given


def test_evaluation_needs_no_gradient() -> None:
    with torch.no_grad():
        checked_terms(Gives(terms(loss=torch.ones(()))), NONE, NONE, NONE)
