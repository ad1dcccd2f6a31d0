"""HTML pages: one frame, one stylesheet, one way to draw. A page is one file that needs no network.

Templates stand beside the code that fills them. Text in them is escaped unless they say otherwise, since text of runs
is untrusted; as a second lock each page's content security policy admits only `page.js`, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
import sys
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zili
from zili.pages import figures

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **context: Any) -> str:
    """The page that `template`, a path below `zili/`, makes of `context`; all of them take a `title`."""
    page = _templates().get_template(template)
    return page.render(version=zili.__version__, command=_command(), date=datetime.now().astimezone(), **context)


def _command() -> str:
    """The command line that this process was started with."""
    name = Path(sys.argv[0]).name or "python"
    return shlex.join(["zili" if name == "__main__.py" else name, *sys.argv[1:]])


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=PackageLoader("zili", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    templates.globals |= {"script": Markup(script), "script_hash": f"sha256-{digest}"}
    templates.filters |= {form.__name__: form for form in figures.FORMS}
    return templates
