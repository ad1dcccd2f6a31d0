"""Chat templates: programs that write a conversation as text.

A template is the text that transformers and vLLM take as `chat_template`; those of the TeleChat family lie beside this
file. A `Dialect` makes ids of what it writes, and knows what a template cannot be asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, cast

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zili.errors import DataError

_MARK = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")


@dataclass(frozen=True)
class ChatTemplate:
    """One template. Rendering is sandboxed: a template that came with a model may look at messages and no more."""

    source: str
    name: str = "chat template"
    _compiled: Callable[..., str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "_compiled", _environment().from_string(self.source).render)
        except (jinja2.TemplateError, RecursionError) as error:
            raise DataError(f"{self.name} is no chat template that can be read: {error}") from error

    @classmethod
    def named(cls, name: str) -> ChatTemplate:
        """One of Zili's: telechat1, telechat2, telechat3, telechat3-coder, chatml; or a file with a template."""
        names = template_names()
        if name in names:
            text = (resources.files("zili.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
            return cls(text, name)
        try:
            return cls(Path(name).read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"there is no chat template {name!r}: choose {', '.join(names)}, or a file with one ({error})"
            ) from error

    @classmethod
    def of_folder(cls, folder: Path) -> ChatTemplate | None:
        """The template beside a model, as transformers looks for it; None where there is none.

        Raises: DataError, it is there and cannot be read.
        """
        if (file := folder / "chat_template.jinja").is_file():
            return cls(_text(file), str(file))
        for name in ("chat_template.json", "tokenizer_config.json"):
            if (file := folder / name).is_file() and (text := _template_in(file)):
                return cls(text, str(file))
        return None

    def write(self, **given: Any) -> str:
        """What it writes of `messages` and its other variables; without signs of what is said unless they are given.

        Raises whatever it likes: it is a foreign program.
        """
        neutral = {"tools": None, "add_generation_prompt": False, "begin_said": "", "end_said": "", "bos_token": ""}
        return self._compiled(**{**neutral, "eos_token": "", **given})

    @cached_property
    def asks_for(self) -> frozenset[str]:
        """Names that it looks up: of options others change nothing."""
        return frozenset(meta.find_undeclared_variables(_environment().parse(self.source)))

    @property
    def without_marks(self) -> str:
        """Its text for engines that do not know what `generation` marks.

        A condition that always holds stands there instead, so that white space is trimmed as before.
        """
        return _MARK.sub(lambda found: f"{found[1]}{'endif' if found[2] else 'if true'}{found[3]}", self.source)


def template_names() -> list[str]:
    """Names of the templates that come with Zili."""
    files = (resources.files("zili.data") / "templates").iterdir()
    return sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja"))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}).") from error


def _template_in(file: Path) -> str | None:
    """A JSON file's `chat_template`; of several named ones the one named default."""
    try:
        config = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: broken JSON ({error}).") from error
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads a plain attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        signs = [nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("begin_said", "end_said")]
        return cast(nodes.Node, nodes.Scope([signs[0], *body, signs[1]], lineno=line))


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers has it (utils/chat_template_utils.py), so that a template means the same in both."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
