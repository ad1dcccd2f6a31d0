"""lm-eval over a model of ours: against plain sums, against its own transformers model, and by the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from zili.config.model import ModelConfig
from zili.data.dialect import Dialect
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError, DataError
from zili.evaluation.harness import Scorer, as_harness_model, harness_package, run_tasks
from zili.models.decoder import Decoder
from zili.release import export_model
from zili.release.native import write_native
from zili.release.tensors import HeldTensors
from zili.serving.model_folder import OpenedModel, open_folder

lm_eval = pytest.importorskip("lm_eval")
TEXT = "the river is blue and 12 + 7 = 19. 山水 火木 which is larger? "


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[OpenedModel, Path]:
    folder = tmp_path_factory.mktemp("model") / "zili"
    folder.mkdir()
    tokenizer = Tokenizer.train([TEXT] * 20, 320)
    config = ModelConfig(
        vocab_size=320,
        hidden_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=12,
        ffn_hidden_size=64,
        max_length=96,
        init_std=0.3,
    )
    torch.manual_seed(0)
    write_native(folder, config, None, HeldTensors(Decoder(config).state_dict()), 10**9)
    tokenizer.save(folder)
    return open_folder(folder), folder


class Asked:
    """A request as the harness makes them."""

    def __init__(self, *args: Any) -> None:
        self.args = args


PAIRS = [
    ("the river is", " blue"),
    ("12 + 7 =", " 19"),
    ("", "the"),
    ("which is larger? ", "山水"),
    ("a b", " c d e f"),
]


def test_likelihoods_are_sums_over_the_continuation(opened: tuple[OpenedModel, Path]) -> None:
    model, tokenizer = opened[0].model, opened[0].tokenizer
    found = as_harness_model(Scorer(opened[0], batch_size=3)).loglikelihood([Asked(*pair) for pair in PAIRS])
    for (context, continuation), (log_prob, greedy) in zip(PAIRS, found, strict=True):
        whole = [tokenizer.end_id, *tokenizer.encode(context + continuation).tolist()]
        begins = 1 + len(tokenizer.encode(context.rstrip()).tolist())
        with torch.no_grad():
            logits = model(torch.tensor([whole]))[0].log_softmax(-1)
        expected = sum(float(logits[place - 1, whole[place]]) for place in range(begins, len(whole)))
        likeliest = all(int(logits[place - 1].argmax()) == whole[place] for place in range(begins, len(whole)))
        assert log_prob == pytest.approx(expected, abs=1e-4)
        assert greedy == likeliest


GROWING = ["return the answer: 首都北京市。答案是不对的。中国的首都是北京。中国电信 impossible"] * 50
TOGETHER = [
    *(("    retur", choice) for choice in ("n x", "n", "ned", "xx")),
    *(("impo", choice) for choice in ("rt", "rt os", "ssible")),
    *(("中", choice) for choice in ("国", "央")),
    *(("首都北", choice) for choice in ("京", "京市", "海")),
    *(("答案是不", choice) for choice in ("对的", "错")),
    ("retur ", "n"),
]


@pytest.fixture(scope="module")
def growing(opened: tuple[OpenedModel, Path]) -> Scorer:
    """A model whose tokenizer has long words as one token."""
    return Scorer(replace(opened[0], tokenizer=Tokenizer.train(GROWING, 320)), batch_size=4)


def test_a_continuation_that_grows_together_with_its_context_is_scored(growing: Scorer) -> None:
    encode, model = growing.tokenizer.encode, growing.model
    found = as_harness_model(growing).loglikelihood([Asked(*pair) for pair in TOGETHER])
    merged = 0
    for (context, continuation), (log_prob, _) in zip(TOGETHER, found, strict=True):
        before, whole = encode(context.rstrip()).tolist(), encode(context + continuation).tolist()
        # The last token that both have, counted from the front; all that follows it is scored.
        begins = max(n for n in range(len(before) + 1) if whole[:n] == before[:n])
        merged += begins < len(before)
        with torch.no_grad():
            logits = model(torch.tensor([[growing.tokenizer.end_id, *whole]]))[0].log_softmax(-1)
        expected = sum(float(logits[place, whole[place]]) for place in range(begins, len(whole)))
        assert log_prob == pytest.approx(expected, abs=1e-4) and log_prob < -1e-3, (context, continuation)
        pair = [growing.tokenizer.end_id, *whole[:begins]], whole[begins:]
        assert growing.encode_pair(context, continuation) == pair
    assert merged >= 5, "the case is there"


def test_an_answer_in_a_conversation_is_scored_after_its_ids(opened: tuple[OpenedModel, Path]) -> None:
    scorer = Scorer(opened[0])
    talk = [{"role": "user", "content": "which is larger?"}]
    before, after = scorer.encode_pair(scorer.conversation(talk), " 山水")
    assert before == scorer.dialect.render(talk, add_generation_prompt=True).ids
    assert after == scorer.tokenizer.encode(" 山水").tolist()


def test_lm_eval_s_own_model_in_transformers_agrees(opened: tuple[OpenedModel, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_model(opened[1], tmp_path / "out", layout="llama")
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "out"),
        # What a document begins after is the end token here.
        prefix_token_id=opened[0].tokenizer.end_id,
    )
    scorer = Scorer(opened[0])
    pairs = [pair for pair in PAIRS if not pair[0]]
    requests = [Asked(*pair) for pair in pairs]
    expected = [value for value, _ in theirs.loglikelihood([_instance(*pair) for pair in pairs], disable_tqdm=True)]
    found = [value for value, _ in as_harness_model(scorer).loglikelihood(requests)]
    assert found == pytest.approx(expected, abs=1e-4)
    rolled = theirs.loglikelihood_rolling([_instance(TEXT * 3)], disable_tqdm=True)
    assert as_harness_model(scorer).loglikelihood_rolling([Asked(TEXT * 3)]) == pytest.approx(rolled, rel=1e-3)


def _instance(*args: str) -> Any:
    from lm_eval.api.instance import Instance

    kind = "loglikelihood" if len(args) == 2 else "loglikelihood_rolling"
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("x", 0, 1))


def test_a_text_that_one_window_holds_is_summed_token_by_token(opened: tuple[OpenedModel, Path]) -> None:
    ids = [opened[0].tokenizer.end_id, *opened[0].tokenizer.encode(TEXT).tolist()]
    with torch.no_grad():
        logits = opened[0].model(torch.tensor([ids]))[0].log_softmax(-1)
    expected = sum(float(logits[place - 1, ids[place]]) for place in range(1, len(ids)))
    assert as_harness_model(Scorer(opened[0])).loglikelihood_rolling([Asked(TEXT)]) == [
        pytest.approx(expected, rel=1e-5)
    ]


def test_answers_stop_where_the_task_says(opened: tuple[OpenedModel, Path]) -> None:
    scorer = Scorer(opened[0])
    model = as_harness_model(scorer)
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    (whole,) = model.generate_until([Asked("the river", options)])
    assert whole
    stop = whole[len(whole) // 2]
    (cut,) = model.generate_until([Asked("the river", {**options, "until": [stop]})])
    assert cut == whole[: whole.index(stop)]
    assert scorer.shortened == 0
    model.generate_until([Asked(TEXT * 20, options)])
    assert scorer.shortened == 1


def test_a_conversation_is_asked_in_the_template_s_ids(opened: tuple[OpenedModel, Path]) -> None:
    scorer = Scorer(opened[0])
    talk = [{"role": "user", "content": "river <_bot>?"}]
    ids = scorer.prompt_ids(as_harness_model(scorer).apply_chat_template(talk))
    dialect = Dialect.named("telechat2", scorer.tokenizer)
    assert ids == dialect.render(talk, add_generation_prompt=True).ids
    scorer.dialect = None
    with pytest.raises(DataError, match="no chat template"):
        scorer.conversation(talk)


def test_own_tasks_run_without_a_network(
    opened: tuple[OpenedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from zili.cli.app import app

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "scores.json"
    words = ["--tasks", "zili_arithmetic,zili_order,zili_copy", "--limit", "6", "--few-shot", "1", "--out", str(out)]
    found = CliRunner().invoke(app, ["eval", str(opened[1]), *words], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert "no benchmark" in found.stdout
    rows = {row["task"]: row for row in json.loads(out.read_text())["evaluations"]}
    assert set(rows) == {"zili_arithmetic", "zili_order", "zili_copy"}
    assert all(row["samples"] == 6 and row["generated"] and row["few_shot"] == 1 for row in rows.values())
    assert rows["zili_copy"]["metric"] == "exact_match" and rows["zili_order"]["metric"] == "acc"


def test_a_task_of_one_s_own(opened: tuple[OpenedModel, Path], tmp_path: Path) -> None:
    """Three of four questions have the answer that the model itself finds likelier."""
    scorer = Scorer(opened[0])
    choices = [" blue", " 19"]
    known = [value for value, _ in as_harness_model(scorer).loglikelihood([Asked("the river is", c) for c in choices])]
    best = int(known[1] > known[0])
    rows = [{"q": "the river is", "c": ["blue", "19"], "a": answer} for answer in (best, 1 - best, best, best)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(
        f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc}}]
"""
    )
    (score,) = [one for one in run_tasks(scorer, ["mine"], include=tmp_path) if one.metric == "acc"]
    assert (score.value, score.samples, score.generated) == (0.75, 4, False)


def test_the_thousands_of_lm_evals_tasks_are_read_only_when_wanted(
    opened: tuple[OpenedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    real = harness_package().tasks.TaskManager

    def manager(*, include_defaults: bool = True, **more: Any) -> Any:
        read.append(include_defaults)
        return real(include_defaults=False, **more)

    monkeypatch.setattr(harness_package().tasks, "TaskManager", manager)
    run_tasks(Scorer(opened[0]), ["zili_copy"], limit=1)
    assert read == [False]
    with pytest.raises(ConfigError, match="no task 'gsm8k'"):  # not in what was read instead
        run_tasks(Scorer(opened[0]), ["zili_copy", "gsm8k"], limit=1)
    assert read[-1] is True


@pytest.mark.slow  # lm-eval reads its thousands of tasks
def test_a_task_that_is_not_there(opened: tuple[OpenedModel, Path]) -> None:
    with pytest.raises(ConfigError, match="no task 'zili_arithmetics'; did you mean zili_arithmetic"):
        run_tasks(Scorer(opened[0]), ["zili_arithmetics"])


def test_without_the_harness(opened: tuple[OpenedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'zili\[eval\]'"):
        run_tasks(Scorer(opened[0]), ["zili_copy"])
