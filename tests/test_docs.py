"""Docs name what there is: every file, link, command, option, key and function in them is looked up."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import claims
import module_map
import pytest
import quote
from typer.main import get_command

from zili.chips.catalog import catalog
from zili.cli.app import app
from zili.cli.app import command as load_command
from zili.config import RunConfig
from zili.config.fields import fields_at

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TOP = ("zili", "tests", "docs", "recipes", "benchmarks", "tools", "examples")
HOW_TO = sorted((ROOT / "docs" / "extending").glob("*.md"))
LONGEST_HOW_TO = 40
MADE_BY_THE_READER = {
    *("recipe.toml", "recipes/mine.toml", "report.html", "runs/quickstart", "runs/run", "texts/json", "p.html"),
    *("tokenizer.json", "generation_config.json", "configuration.json", "release.json", "published_runs.csv"),
    *("zili_acme.py", "zili_acme_operations.py", "device-check/device-check.md", "device-check/device-check.json"),
    *("zili_acme.toml", "tokenizer_config.json", "config.json", "model.json", "run.json", "index.json"),
    *("summary.json", "supervision/generation"),
}
"""Files and folders that a run, a release or the reader makes; examples."""
OF_ANOTHER = re.compile(r"[*<{]|NAME|^\w+/s$|^RUN/")
"""Patterns, and units such as bytes/s."""
_ENDING = r"\.(py|toml|jsonl?|md|html|gguf|partial)$"
WRONG = ("training.batch_size",)
"""What docs show as refused."""
KEYS_OF_ONE = ("model.preset", "model.folder", "model.shape_of", "model.scaled_to")
"""Read before the rest of a recipe."""


def inline(page: str) -> list[str]:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


def code_lines(page: str) -> list[str]:
    """Lines of code blocks, fenced or indented, those that go on in the next one joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = "\n".join(re.findall(r"^```.*?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    indented = "\n".join(re.findall(r"^    (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M))
    return re.sub(r"\\\n\s*", " ", f"{fenced}\n{indented}").splitlines()


@cache
def names_of_files() -> set[str]:
    places = [ROOT / top for top in TOP] + [ROOT]
    found = {path.name for place in places[:-1] for path in place.rglob("*") if path.is_file()}
    return found | {path.name for path in ROOT.iterdir()}


def is_there(path: str) -> bool:
    clean = path.rstrip("/")
    if "/" not in clean:
        return clean in names_of_files()
    return any((place / clean).exists() for place in (ROOT, ROOT / "zili", ROOT / "docs", ROOT / "tests"))


def paths_in(page: str) -> Iterator[str]:
    for text in inline(page):
        if re.fullmatch(r"[\w.-]+(?:/[\w.*<>{},-]+)+/?|[\w-]+\.(?:py|toml|md|c|html|css|json|csv|sh|mjs)", text):
            yield text
    for line in code_lines(page):
        yield from re.findall(rf"(?<![\w/.-])(?:{'|'.join(TOP)})/[\w./-]*\w", line)


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_file_that_is_named_is_there(page: str) -> None:
    named = {path for path in paths_in(page) if not OF_ANOTHER.search(path)}
    missing = [path for path in sorted(named) if path.rstrip("/") not in MADE_BY_THE_READER and not is_there(path)]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        whole = ((ROOT / page).parent / path) if path else ROOT / page
        assert whole.exists(), target
        assert not anchor or anchor in anchors(whole), target


def commands_in(page: str) -> Iterator[list[str]]:
    """The words behind `zili` of every command line, comments left out."""
    for line in [*inline(page), *code_lines(page)]:
        found = re.match(r"(?:\$ )?(?:[\w./-]*/)?(?:zili|(?:python|torchrun\b.*) -m zili) (.*)", line.strip())
        if found is None:
            continue
        words = found[1].partition("  # ")[0].partition(" && ")[0]
        try:
            yield shlex.split(words, comments=True)
        except ValueError:
            yield words.split()


@cache
def all_commands() -> Any:
    return get_command(app)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words call, and the words behind its name."""
    command = all_commands()
    while words and hasattr(command, "commands"):
        if "run" in command.commands and words[0] not in command.commands:
            words = ["run", *words]  # `zili launch RECIPE`
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command = load_command(words[0]) if command is all_commands() else command.commands[words[0]]
        words = words[1:]
    return command, words


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_command_and_option_is_one(page: str) -> None:
    for words in commands_in(page):
        if words[:1] in (["COMMAND"], ["WORDS"]) or words[0].startswith("-"):
            continue
        command, rest = command_of([word.strip("`,.;:") for word in words])
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        options = [found for word in rest for found in re.findall(r"^[\[(]*(--[a-z][\w-]*)", word)]
        assert [option for option in options if option not in known | {"--help"}] == [], words


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_key_that_is_set_is_one(page: str) -> None:
    lines = [*inline(page), *code_lines(page)]
    for key in (found for line in lines for found in re.findall(r"--set ['\"]?([a-z][\w.]*)=", line)):
        assert key == "table.key" or is_key(key), key


def is_key(dotted: str) -> bool:
    *place, last = dotted.split(".")
    return (
        dotted in KEYS_OF_ONE or dotted.startswith(("chip.operations", "chip.capabilities")) or last in fields_at(place)
    )


@cache
def members(file: Path) -> dict[str, set[str]]:
    """Names at the top of a source file; of classes, the names in them."""
    found: dict[str, set[str]] = {}
    top = ast.parse(file.read_text(encoding="utf-8")).body
    top += [inner for node in top if isinstance(node, ast.If) for inner in node.body]  # for type checkers
    for node in top:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            inside = getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []
            found[node.name] = {name for part in inside for name in assigned(part)}
        else:
            found |= {name: set() for name in assigned(node)}
    return found


def assigned(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.ImportFrom | ast.Import):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def is_code(dotted: str) -> bool:
    """Whether `training.setup.set_up` or `ops.choose` names a module of the package, or something in one."""
    place, parts = ROOT / "zili", dotted.removeprefix("zili.").split(".")
    while parts and (place / parts[0]).is_dir():
        place, parts = place / parts[0], parts[1:]
    if parts and (place / f"{parts[0]}.py").is_file():
        file, parts = place / f"{parts[0]}.py", parts[1:]
    else:
        file = place / "__init__.py"
    if not parts:
        return True
    there = members(file)
    return parts[0] in there and (len(parts) == 1 or parts[1] in there[parts[0]] or file.name == "__init__.py")


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_function_and_key_that_is_named_is_there(page: str) -> None:
    rooms = {path.name for path in (ROOT / "zili").iterdir() if path.is_dir()}
    unknown = []
    for text in inline(page):
        name = re.sub(r"\(.*\)$", "", text.partition(" = ")[0].partition("=")[0])
        if not re.fullmatch(r"[a-z_]+(?:\.[A-Za-z_0-9]+)+", name) or re.search(_ENDING, name) or name in WRONG:
            continue
        first = name.split(".")[0]
        if first in rooms | {"zili", *RunConfig.model_fields} and not (is_key(name) or is_code(name)):
            unknown.append(name)
    assert unknown == []


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_target_of_make_is_one(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    lines = [*inline(page), *code_lines(page)]
    named = {found for line in lines for found in re.findall(r"^\$? ?make ([a-z][a-z-]*)(?![\w=])", line)}
    assert named <= targets


def test_every_quote_is_what_its_file_says() -> None:
    behind = [page.name for page in quote.pages() if quote.with_quotes(text := page.read_text("utf-8")) != text]
    assert behind == [], "`make docs` renews them"
    texts = [page.read_text("utf-8") for page in quote.pages()]
    quoted = {name for text in texts for name in re.findall(r"<!-- (examples/\w+\.py)", text)}
    assert quoted == {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_how_to_add_a_thing_fits_on_a_screen(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= LONGEST_HOW_TO


CLAIMS = claims.claims_in((ROOT / "docs" / "claims.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_every_claim_has_a_command_that_can_be_run(claim: claims.Claim) -> None:
    program, *words = claim.command
    if program == "zili":
        command_of(words)
    else:
        assert program in ("pytest", "python"), "others may not be installed"
    files = [word.partition("::")[0] for word in words if re.search(_ENDING, word)]
    assert files or program == "zili"
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_a_page_of_claims_that_says_too_little_is_refused() -> None:
    whole = "## One\n\n```\n$ zili plan x\n3.2 days in 4 s\n```\n"
    (claim,) = claims.claims_in(whole)
    assert (claim.command, claim.last_line) == (["zili", "plan", "x"], "3.2 days in 4 s")
    assert claims.without_numbers("11 days in 1.2e-3 s") == claims.without_numbers(claim.last_line)
    assert claims.without_numbers("1 skipped in 3 s") != claims.without_numbers("1 passed in 3 s")
    for page in ("## One\n\nwords\n", "## One\n\n```\n$ zili plan x\n```\n", whole + whole.partition("\n")[2]):
        with pytest.raises(ValueError, match="'One'"):
            claims.claims_in(page)


def test_a_claim_that_fails_or_prints_something_else_does_not_hold(capsys: pytest.CaptureFixture[str]) -> None:
    def outcome(code: str, last_line: str = "2 passed") -> str:
        return claims.run(claims.Claim("one", ["python", "-c", code], last_line), seconds=60)

    assert outcome("print('1 passed')") == ""
    assert outcome("print('1 skipped')") == "it ended with '1 skipped', and the page says '2 passed'"
    assert outcome("print('1 passed'); exit(3)") == "exit code 3"
    command = ["python", "-c", "import time; time.sleep(60)"]
    assert claims.run(claims.Claim("one", command, "1 passed"), seconds=0.1) == "took more than 0 s"


def test_the_site_has_every_page_once() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"[\w/.]+\.md", site.partition("\nnav:")[2])
    there = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted([*there, "index.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md"])


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'zili[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "micro_batch" in (tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "Raises" in page and 'id="zili.objectives.objective.Objective.terms"' in page


def test_the_readme_counts_the_chips_of_the_catalog() -> None:
    (told,) = re.findall(r"figures of (\d+) chip models", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert int(told) == len(catalog())


def test_the_readme_names_every_command() -> None:
    named = {words[0] for words in commands_in("README.md") if words}
    assert set(all_commands().commands) <= named


def test_what_is_not_there_would_be_found(tmp_path: Path) -> None:
    """Each of the checks above can fail."""
    assert not is_there("zili/release/transfer.py") and not is_there("diagnosis/yardstick.py")
    assert not is_code("training.setup.no_such") and not is_key("training.epochs")
    assert is_code("training.setup.set_up") and is_code("zili.load") and is_key("training.steps")
    with pytest.raises(AssertionError, match="no command"):
        command_of(["trian", "x.toml"])


def test_the_map_of_the_package_is_the_tree() -> None:
    assert module_map.PAGE.read_text(encoding="utf-8") == module_map.page(), "run `python tools/module_map.py`"
