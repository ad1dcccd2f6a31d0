"""lm-eval's harness over a model of ours: every task it has, or files of one's own, likelihoods and answers.

Source: EleutherAI/lm-evaluation-harness, `lm_eval.api.model.LM` (what is asked of a model) and docs/model_guide.md.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from zili.data.dialect import Dialect
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError, DataError
from zili.models.decoder import Decoder
from zili.release.record import Evaluation
from zili.serving.generate.generation import Sampling, generate
from zili.serving.generate.text_stream import AnswerText
from zili.serving.model_folder import OpenedModel

_NEEDS = "tasks need the package lm-eval: pip install 'zili[eval]'"
_ANSWER_TOKENS = 256
"""Longest answer where the task does not say."""


def harness_package() -> Any:
    """The `lm_eval` package. Raises ConfigError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise ConfigError(f"{_NEEDS} ({error})") from error
    return lm_eval


class Scorer:
    """What the harness asks of a model, without its package."""

    def __init__(self, opened: OpenedModel, batch_size: int = 8) -> None:
        self.model: Decoder = opened.model
        self.tokenizer: Tokenizer = opened.tokenizer
        self.dialect: Dialect | None = opened.dialect
        self.batch_size = batch_size
        self.shortened = 0
        """Requests whose beginning did not fit the context and was left out."""
        self._device = opened.model.head_weight.device

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut at the last token that the context has by itself too; spaces at its end belong to the
        continuation.

        A continuation may grow together with the context's last tokens (北 and 京 are one token, 北京): what is scored
        then is the text from there on. Cut by the number of the context's tokens, as lm-eval's `_encode_pair` has it,
        such a continuation would be empty, or begin later than it does, and all but certain. After a conversation
        nothing grows together: an answer begins after a special token, or as a piece of its own.
        """
        if context.startswith(_CONVERSATION):
            return self.prompt_ids(context), self.tokenizer.encode(continuation).tolist()
        trailing = len(context) - len(context.rstrip())
        if trailing:
            context, continuation = context[:-trailing], context[-trailing:] + continuation
        before = self.tokenizer.encode(context).tolist() if context else []
        whole = self.tokenizer.encode(context + continuation).tolist()
        apart = (place for place, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
        common = next(apart, min(len(before), len(whole)))
        # A document begins after BOS or an end token, in training as here.
        return [self.tokenizer.start_id, *whole[:common]], whole[common:]

    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, float, bool]]:
        """Place, log-probability and whether it is the greedy one, of each continuation; the longest first."""
        order = sorted(range(len(pairs)), key=lambda place: -len(pairs[place][0]) - len(pairs[place][1]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            yield from self._batch(places, [self._fitted(*pairs[place]) for place in places])

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        room = self.model.config.max_length + 1
        if len(continuation) >= room:
            raise DataError(
                f"a continuation of {len(continuation)} tokens does not fit the model's context of {room - 1}"
            )
        kept = context[-(room - len(continuation)) :]
        self.shortened += len(kept) < len(context)
        return kept, continuation

    @torch.no_grad()
    def _batch(
        self, places: Sequence[int], pairs: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[int, float, bool]]:
        longest = max(len(context) + len(continuation) for context, continuation in pairs) - 1
        inputs = torch.full((len(pairs), longest), self.tokenizer.end_id, device=self._device)
        for row, (context, continuation) in enumerate(pairs):
            ids = [*context, *continuation][:-1]
            inputs[row, : len(ids)] = torch.tensor(ids)
        hidden = self.model.hidden_states(inputs)
        for row, (place, (context, continuation)) in enumerate(zip(places, pairs, strict=True)):
            # Logits of the continuation alone: those of a whole batch over a large vocabulary would take gigabytes.
            start = len(context) - 1
            logits = self.model.logits(hidden[row, start : start + len(continuation)])
            wanted = torch.tensor(continuation, device=self._device)
            log_probs = logits.log_softmax(-1).gather(1, wanted[:, None])
            yield place, float(log_probs.sum()), bool((logits.argmax(-1) == wanted).all())

    def rolling(self, text: str) -> float:
        """Log-probability of a whole text, each token once, in windows of the context's length."""
        ids = self.tokenizer.encode(text).tolist()
        room = self.model.config.max_length
        windows = []
        for start in range(0, len(ids), room):
            part = ids[start : start + room]
            # As much before it as fits, and where it is the first, the token that a document begins after.
            before = [self.tokenizer.start_id, *ids[:start]][-(room + 1 - len(part)) :]
            windows.append((before, part))
        return sum(log_prob for _, log_prob, _ in self.log_likelihoods(windows))

    def answer(self, context: str, *, until: Sequence[str], max_new_tokens: int, sampling: Sampling) -> str:
        """What follows `context`, up to the first of `until`."""
        ids = self.prompt_ids(context)
        room = self.model.config.max_length - min(max_new_tokens, self.model.config.max_length // 2)
        self.shortened += len(ids) > room
        spoken = self.dialect if context.startswith(_CONVERSATION) else None
        stops = spoken.end_ids if spoken else self.tokenizer.end_ids
        ends = [text for text in (*until, *(spoken.end_texts if spoken else ())) if text]
        text, said = AnswerText(self.tokenizer, ends, skip_special=False), ""
        for token in generate(
            self.model,
            ids[-room:],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=stops,
            vocabulary=self.tokenizer.vocab_size,
        ):
            said += text.push(token)
            if text.stopped:
                return said
        return said + text.finish()

    def prompt_ids(self, context: str) -> list[int]:
        """A text's ids at the beginning of a document; a conversation's, where `conversation` wrote it."""
        if context.startswith(_CONVERSATION):
            assert self.dialect is not None
            messages = json.loads(context[len(_CONVERSATION) :])
            return self.dialect.render(messages, add_generation_prompt=True).ids
        return [self.tokenizer.start_id, *self.tokenizer.encode(context).tolist()]

    def conversation(self, messages: Sequence[dict[str, str]]) -> str:
        """Messages as a context that `prompt_ids` knows again: ids are made of them, and no text spells a mark."""
        if self.dialect is None:
            raise DataError("the model has no chat template, nor special tokens of one that is known; leave out --chat")
        return _CONVERSATION + json.dumps(list(messages), ensure_ascii=False)


_CONVERSATION = "\x00zili conversation\x00"


def as_harness_model(scorer: Scorer, progress: Callable[[str], None] | None = None) -> Any:
    """`scorer` as an `lm_eval.api.model.LM`."""
    package = harness_package()
    say = progress or (lambda _: None)

    class ZiliModel(package.api.model.LM):  # type: ignore[name-defined]
        tokenizer_name = "zili"

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [scorer.encode_pair(*request.args) for request in requests]
            found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
            for count, (place, log_prob, greedy) in enumerate(scorer.log_likelihoods(pairs), start=1):
                found[place] = log_prob, greedy
                say(f"likelihoods: {count:,} of {len(pairs):,}")
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return [scorer.rolling(request.args[0]) for request in requests]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            answers = []
            for count, request in enumerate(requests, start=1):
                context, options = request.args
                until = options.get("until") or []
                answers.append(
                    scorer.answer(
                        context,
                        until=[until] if isinstance(until, str) else until,
                        max_new_tokens=int(options.get("max_gen_toks", _ANSWER_TOKENS)),
                        sampling=_sampling(options),
                    )
                )
                say(f"answers: {count:,} of {len(requests):,}")
            return answers

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return scorer.conversation(chat_history)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return scorer.dialect.template.source if scorer.dialect else ""

    return ZiliModel()


def _sampling(options: dict[str, Any]) -> Sampling:
    """As the task asks: greedy unless it samples."""
    if not options.get("do_sample", False) or float(options.get("temperature", 0.0)) == 0.0:
        return Sampling(temperature=0)
    return Sampling(float(options["temperature"]), float(options.get("top_p", 1.0)), int(options.get("top_k", 0)))


# ---- tasks

OWN_TASKS = Path(__file__).with_name("tasks")


def run_tasks(
    scorer: Scorer,
    names: Sequence[str],
    *,
    include: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Evaluation]:
    """Evaluate `names`: tasks and groups of lm-eval, of `include`, and Zili's own.

    Raises:
        ConfigError: no such task, or lm-eval is not installed.
        DataError: a task's data cannot be had.
    """
    package = harness_package()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _tasks(package, include, names)
    _check_names(names, manager.all_tasks)
    try:
        results = package.evaluator.simple_evaluate(
            as_harness_model(scorer, progress),
            tasks=list(names),
            num_fewshot=few_shot,
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            bootstrap_iters=1000,
            log_samples=False,
            task_manager=manager,
        )
    except (OSError, ConnectionError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"the data of {', '.join(names)} cannot be had: {reason}; these tasks fetch it from a hub. Where there is "
            "none, write a task over files of yours (dataset_path: json) and name its folder with --include-path"
        ) from error
    return list(_scores(results))


def task_names(include: Path | None = None) -> list[str]:
    """Every task and group there is."""
    names: list[str] = _tasks(harness_package(), include).all_tasks
    return names


def _tasks(package: Any, include: Path | None, wanted: Sequence[str] = ()) -> Any:
    """lm-eval's `TaskManager` of ours, of `include`, and unless that has all `wanted`, of lm-eval's own: reading what
    those thousands are called takes seconds."""
    paths = [str(path) for path in (OWN_TASKS, include) if path is not None]
    few = package.tasks.TaskManager(include_path=paths, include_defaults=False)
    return few if wanted and set(wanted) <= set(few.all_tasks) else package.tasks.TaskManager(include_path=paths)


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`zili eval --list-tasks` names them"
            raise ConfigError(f"there is no task {name!r}; {hint}")


def _scores(results: dict[str, Any]) -> Iterator[Evaluation]:
    own = {path.stem for path in OWN_TASKS.glob("zili_*.yaml")}
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, float | int) or metric.endswith("_stderr") or not chosen:
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            samples = results.get("n-samples", {}).get(task, {}).get("effective", 0)
            few_shot = results.get("n-shot", {}).get(task) or 0
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            found = error if isinstance(error, float) else None
            yield Evaluation(task, name, float(value), found, int(samples), int(few_shot), generated=task in own)
