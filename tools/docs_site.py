"""Hooks of mkdocs.yml: the pages at the top of the repository join the site, and links are as on GitHub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""They stand beside docs/; in the site they stand in it."""
FILES = ("LICENSE",)


def on_config(config: Any) -> Any:
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # Chinese headings keep their letters, as on GitHub
    return config


def on_files(files: Any, config: Any) -> Any:
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        content = re.sub(r"\]\(docs/", "](", text)
        files.append(File.generated(config, "index.md" if name == "README.md" else name, content=content))
    for name in FILES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to README.md leads to the site's first page, which is what it is there."""
    return re.sub(r"\]\((\.\./)*README\.md\)", r"](\1index.md)", markdown)
