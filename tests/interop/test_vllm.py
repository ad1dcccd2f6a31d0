"""vLLM itself, on the CPU, runs what `zili export` writes. `make test-interop` installs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not here: `make test-interop` installs it")
from small_models import MODELS, STEPS, answers, made, prompts

from zili.release import export_model

CASES = [(name, layout) for name in MODELS for layout in ("telechat2", "telechat3", "llama")]
CASES.remove(("telechat3", "telechat2"))


@pytest.fixture(autouse=True)
def quiet_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, no network, little memory."""
    for key, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(os.cpu_count()),
    }.items():
        monkeypatch.setenv(key, value)


def generated(folder: Path) -> Any:
    """What vLLM makes of the prompts: greedy ids and every log-probability."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        dtype="float32",
        enforce_eager=True,
        trust_remote_code=True,
        max_model_len=128,
        max_num_seqs=4,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    return engine.generate([{"prompt_token_ids": prompt} for prompt in prompts()], params, use_tqdm=False)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_greedy_ids_and_log_probabilities(tmp_path: Path, name: str, layout: str) -> None:
    decoder = made(tmp_path / "zili", name)
    export_model(tmp_path / "zili", tmp_path / "out", layout=layout)
    for prompt, found in zip(prompts(), generated(tmp_path / "out"), strict=True):
        ids, log_probs = answers(decoder, prompt)
        theirs = found.outputs[0]
        assert list(theirs.token_ids) == ids
        steps = [*found.prompt_logprobs[1:], *theirs.logprobs]
        said = [step[number].logprob for step, number in zip(steps, [*prompt[1:], *ids], strict=True)]
        assert said == pytest.approx(log_probs, abs=1e-4)
