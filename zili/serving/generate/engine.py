"""Many conversations at once with one model: continuous batching (Yu et al. 2022, Orca).

Each step is one forward pass over what every running sequence has next (`Steps`). Sequences come and go between steps.
One that ends leaves its keys in its slot; who comes next with the same beginning goes on from there, or from a copy of
another's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from zili.errors import ConfigError
from zili.models.cache import served_length
from zili.models.decoder import Decoder
from zili.serving.cpu.kernels import compiled
from zili.serving.cpu.packed import pack
from zili.serving.generate.generation import ActiveSequence, Ask, FinishReason, Scores, Steps, Token

_GUIDES_SECONDS = 0.001
"""After which guides that were not ready are asked again."""


class Answer:
    """What comes back, as it comes. Its methods are safe from any thread."""

    def __init__(self, ask: Ask, notify: Callable[[], None] | None = None) -> None:
        """`notify` is called by the engine's thread whenever there is something new."""
        self.ask = ask
        self.reused = 0
        """Tokens of the prompt whose keys were there already."""
        self.said = 0
        """Tokens that have come."""
        self.prompt: list[Token] = []
        self.error: Exception | None = None
        self.cancelled = False
        self._tokens: deque[Token] = deque()
        self._finished: FinishReason | None = None
        self._notify = notify
        self._changed = threading.Condition()

    def cancel(self) -> None:
        """Nobody waits for it any more: the engine lets go of it before its next step."""
        self.cancelled = True

    @property
    def finished(self) -> FinishReason | None:
        """Why it ended; None while it goes on."""
        return self._finished

    def take(self, most: int | None = None) -> list[Token]:
        """Tokens since the last call, at most so many."""
        with self._changed:
            count = len(self._tokens)
            return [self._tokens.popleft() for _ in range(count if most is None else min(count, most))]

    def wait(self, timeout: float | None = None) -> list[Token]:
        """All tokens to the end.

        Raises: what ended it, where that is an error; TimeoutError.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._finished or self.error, timeout):
                raise TimeoutError("no answer in time")
        if self.error is not None:
            raise self.error
        return self.take()

    def _say(
        self, token: Token | None = None, finished: FinishReason | None = None, error: Exception | None = None
    ) -> None:
        with self._changed:
            if token is not None:
                self._tokens.append(token)
                self.said += 1
            self._finished, self.error = finished or self._finished, error or self.error
            if self._finished or self.error:
                self._changed.notify_all()
        if self._notify is not None:
            self._notify()


class _Sequence(ActiveSequence):
    """A sequence of the engine's."""

    def __init__(self, answer: Answer, slot: int, computed: int) -> None:
        super().__init__(answer.ask, slot, computed)
        self.answer, self.prompt = answer, answer.prompt
        self.held: Scores | None = None
        """What the next token is drawn of, until the guide is ready."""


class Engine:
    """Runs many answers at once, in its own thread. `close`, or leaving its `with` block, ends it."""

    def __init__(
        self,
        model: Decoder,
        *,
        slots: int = 16,
        context: int | None = None,
        tokens_a_step: int = 512,
        vocabulary: int | None = None,
    ) -> None:
        """The model is the engine's from here on.

        Args:
            slots: sequences at once; further ones wait.
            context: tokens of a sequence, prompt and answer; None: the model's, as far as `served_length` allows.
            tokens_a_step: of a forward pass at most, so that a long prompt delays the others by that much only.
            vocabulary: tokens the tokenizer knows; rows of the model beyond are never drawn.
        """
        if min(slots, tokens_a_step) < 1:
            raise ConfigError(f"{slots=}, {tokens_a_step=}: at least 1")
        self.model = model.eval()
        self.context = served_length(model.config, context or model.config.max_length)
        weight = model.head_weight
        kernels = compiled(model.config, weight.dtype) if weight.device.type == "cpu" else None
        self._cache = model.new_cache(slots, self.context, kernels=kernels)
        pack(model, kernels)
        self._steps = Steps(model, self._cache, max(tokens_a_step, slots), vocabulary)
        self.slots = slots
        self._waiting: deque[Answer] = deque()
        self._running: list[_Sequence] = []
        self._kept: dict[int, list[int]] = {slot: [] for slot in range(slots)}
        """Ids whose keys free slots have, the one that was used last at the end."""
        self._work = threading.Condition()
        self._closed = self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="zili-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def load(self) -> tuple[int, int]:
        """How many sequences run, and how many wait."""
        return len(self._running), len(self._waiting)

    @property
    def usage(self) -> float:
        """Share of the slots' room that running sequences use."""
        return sum(len(one.ids) for one in list(self._running)) / (self.slots * self.context)

    def submit(self, ask: Ask, notify: Callable[[], None] | None = None) -> Answer:
        """Begin to answer.

        Raises:
            ConfigError: as `Ask.check`; or the engine is closed.
        """
        ask.check(self.model.config.vocab_size, self.context)
        answer = Answer(ask, notify)
        with self._work:
            if self._closed:
                raise ConfigError("the engine is closed")
            self._waiting.append(answer)
            self._work.notify()
        return answer

    def close(self, *, finish: bool = False) -> None:
        """End the thread: after what was begun is answered, with `finish`, else at once."""
        with self._work:
            self._closed, self._abandoned = True, not finish
            self._work.notify()
        self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._waiting or self._running or self._closed)
                if self._closed and not self._waiting and not self._running:
                    return
            try:
                self._step()
            except Exception as error:  # whoever waits hears of it; the next one may fare better
                for sequence in self._running:
                    self._release(sequence, keep=False)
                    sequence.answer._say(error=error)
                self._running.clear()

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._say_held()
        going = [one for one in self._running if one.computed < len(one.ids)]
        for sequence, scores in self._steps.step(going):
            self._say_next(sequence, scores)
        if self._running and not going:  # all wait for their guides
            with self._work:
                self._work.wait(_GUIDES_SECONDS)

    def _drop_cancelled(self) -> None:
        with self._work:  # a deque to which another thread adds cannot be walked through
            gone = [answer for answer in self._waiting if answer.cancelled or self._abandoned]
            for answer in gone:
                self._waiting.remove(answer)
        for answer in gone:
            answer._say(finished="cancelled")
        for sequence in list(self._running):
            if sequence.answer.cancelled or self._abandoned:
                self._finish(sequence, "cancelled")

    def _admit(self) -> None:
        while self._waiting and self._kept:
            answer = self._waiting.popleft()
            prompt = list(answer.ask.prompt)
            # The last token is computed in any case, for what follows it; all of them where all are told.
            limit = 0 if answer.ask.of_prompt else len(prompt) - 1
            slot = max(self._kept, key=lambda one: _common(self._kept[one], prompt, limit))
            found = _common(self._kept[slot], prompt, limit)
            if not found:
                slot = next(iter(self._kept))  # the one that was used longest ago
            others = [(_common(one.ids[: one.computed], prompt, limit), one.slot) for one in self._running]
            longest, other = max(others, default=(0, 0))
            del self._kept[slot]
            # Among those that run before anything can fail, so that it hears of it.
            self._running.append(sequence := _Sequence(answer, slot, found))
            try:
                sequence.guide = answer.ask.guide() if answer.ask.guide else None
            except Exception as error:
                self._fail(sequence, error)
                continue
            if longest > found:
                self._cache.copy(other, slot, longest)
                sequence.computed = longest
            answer.reused = sequence.computed

    def _say_held(self) -> None:
        for sequence in [one for one in self._running if one.held is not None]:
            held, sequence.held = sequence.held, None
            if held is not None:
                self._say_next(sequence, held)

    def _say_next(self, sequence: _Sequence, scores: Scores) -> None:
        wants = sequence.said < sequence.ask.max_new_tokens
        if wants and sequence.guide is not None and not sequence.guide.ready:
            sequence.held = scores
            return
        try:
            token = sequence.say(scores, self.context)
        except Exception as error:  # whatever it is, it is this sequence's alone
            self._fail(sequence, error)
            return
        if token is not None:
            sequence.answer._say(token)
        if sequence.finished is not None:
            self._finish(sequence, sequence.finished)

    def _fail(self, sequence: _Sequence, error: Exception) -> None:
        self._running.remove(sequence)
        self._release(sequence, keep=False)
        sequence.answer._say(error=error)

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        self._running.remove(sequence)
        self._release(sequence, keep=True)
        sequence.answer._say(finished=reason)

    def _release(self, sequence: _Sequence, *, keep: bool) -> None:
        self._kept[sequence.slot] = sequence.ids[: sequence.computed] if keep else []
        if sequence.guide is not None:
            sequence.guide.close()


def _common(kept: Sequence[int], prompt: Sequence[int], limit: int) -> int:
    """How many tokens both begin with, at most `limit`."""
    count = 0
    for one, other in zip(kept, prompt[:limit], strict=False):
        if one != other:
            break
        count += 1
    return count
