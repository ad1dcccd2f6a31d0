"""Chat in a terminal, or with lines from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from zili.errors import ZiliError
from zili.models.decoder import Decoder
from zili.serving.generate.conversation import Conversation
from zili.serving.generate.generation import DEFAULT_SAMPLING, Sampling, generate
from zili.serving.generate.text_stream import AnswerText, visible

HELP = """/reset  forget the conversation and start anew
/exit   leave (or Ctrl-D)
/help   these lines
Ctrl-C stops an answer. A line that begins with a space is never a command."""


@dataclass
class Chat:
    """One conversation with a model: `handle` takes a line and writes the answer as it comes.

    `write` gets the answer's pieces; `note` gets whole lines about the conversation itself.
    """

    model: Decoder
    conversation: Conversation
    write: Callable[[str], None]
    note: Callable[[str], None]
    max_new_tokens: int = 512
    sampling: Sampling = DEFAULT_SAMPLING
    asked: int = 0

    def run(self, lines: Iterator[str]) -> None:
        """Greet, then handle lines until they end or `/exit`."""
        self.note(self.conversation.greeting)
        for line in lines:
            if not self.handle(line):
                return

    def handle(self, line: str) -> bool:
        """Obey a command or answer a line; False when the user wants to leave."""
        command = line.strip()
        if line.startswith("/") and command[1:].isalpha():
            return self._obey(command)
        if command:
            self._answer(typed_text(line.rstrip("\n")))
        return True

    def _obey(self, command: str) -> bool:
        if command in ("/exit", "/quit"):
            return False
        if command == "/reset":
            self.conversation.reset()
            self.note(self.conversation.new)
        elif command == "/help":
            self.note(HELP)
        else:
            self.note(f"There is no command {command}.\n{HELP}")
        return True

    def _answer(self, text: str) -> None:
        self.conversation.ask(text)
        taken: list[int] = []
        try:
            self._stream(taken)
        except KeyboardInterrupt:
            self.write("\n")
            self.note("Stopped.")
        except ZiliError as error:
            self.conversation.withdraw()
            self.note(str(error))
            return
        self.conversation.answered(taken)

    def _stream(self, taken: list[int]) -> None:
        """Write the answer. Its tokens go into `taken` as they come, so that Ctrl-C keeps what was said."""
        limit = int(self.model.config.max_length)
        room = limit - min(self.max_new_tokens, limit // 2)
        prompt, dropped = self.conversation.prompt(room)
        if dropped:
            self.note(f"The context of {limit} tokens is full: the oldest {dropped} turns are forgotten.")
        self.asked += 1
        tokens = generate(
            self.model,
            prompt,
            max_new_tokens=self.max_new_tokens,
            sampling=replace(self.sampling, seed=self.sampling.seed + self.asked - 1),
            stop_ids=self.conversation.stop_ids,
            vocabulary=self.conversation.tokenizer.vocab_size,
        )
        before = prompt if self.conversation.goes_on else ()
        text = AnswerText(self.conversation.tokenizer, self.conversation.stop_texts, before=before)
        for token in tokens:
            taken.append(token)
            self.write(text.push(token))
            if text.stopped:
                self.write("\n")
                return
        self.write(text.finish() + "\n")
        if len(taken) == self.max_new_tokens:
            self.note(f"Cut after {len(taken)} tokens; --max-new-tokens allows more.")
        elif len(prompt) + len(taken) >= limit:
            self.note(f"Cut where the model's context of {limit} tokens was full.")


def typed_lines(prompt: str, note: Callable[[str], None]) -> Iterator[str]:
    """Lines from the keyboard with history and editing, until Ctrl-D; Ctrl-C only clears the line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it gives input() its line editing)
    while True:
        try:
            yield input(prompt)
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\n/exit or Ctrl-D leaves.")


def piped_lines() -> Iterator[str]:
    """Lines from standard input, as they come; broken UTF-8 becomes U+FFFD."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "replace")


def typed_text(text: str) -> str:
    """Text from the command line or the keyboard; what was no UTF-8 in it becomes U+FFFD."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def write_output(text: str) -> None:
    """Text to standard output at once: as it is into a file or pipe, made harmless on a terminal."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_note(text: str) -> None:
    """A line about the conversation, kept out of what a pipe receives."""
    print(text, file=sys.stderr, flush=True)
