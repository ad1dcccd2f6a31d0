"""lm-eval scores a served model as one that it loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from served import Place, serve_a_tiny_model

from zili.serving.http.keys import Keys

PAIRS = [("What is the colour of", " snow"), ("Und der Himmel ist", " blau."), ("snow", " snow snow snow")]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(Keys())


@pytest.mark.slow  # to import lm_eval takes seconds
def test_log_likelihoods(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = place.served.tokenizer
    tokenizer.save(tmp_path)
    evaluated = LocalCompletionsAPI(
        model="tiny",
        base_url=f"{place.url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(tmp_path),
        num_concurrent=2,
        max_length=256,
    )
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    for (context, continuation), (found, greedy) in zip(PAIRS, evaluated.loglikelihood(asked), strict=True):
        begins, whole = tokenizer.encode(context).tolist(), tokenizer.encode(context + continuation).tolist()
        with torch.no_grad():
            logits = place.model(torch.tensor([whole]))[0, :-1, : tokenizer.vocab_size]
        rows, ids = logits.log_softmax(-1)[len(begins) - 1 :], torch.tensor(whole[len(begins) :])
        assert found == pytest.approx(float(rows.gather(1, ids[:, None]).sum()), abs=1e-3)
        assert greedy == bool((rows.argmax(-1) == ids).all())
