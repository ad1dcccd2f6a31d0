"""The page of `zili.diagnosis.device_check`, and what is taken out of its report before anyone sees it."""

from __future__ import annotations

import getpass
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_KEPT = ("chip", "backend", "device", "model", "area", "severity", "state")
"""Values that are names of chips and words of ours: a user called `ascend` takes none of them away."""
_VERDICTS = {
    "good": "sound",
    "fallback": "sound; what falls back or was skipped is named below",
    "degraded": "degraded: runs will be slow or not repeat themselves",
    "broken": "broken: something is wrong or failed",
}


def without_names(value: Any) -> Any:
    """`value`, of plain JSON, without names of this machine, its user and their folders in its texts."""
    replacements = list(_names())

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: one if key in _KEPT else cleaned(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [cleaned(one) for one in value]
        if isinstance(value, str):
            for pattern, stand_in in replacements:
                value = pattern.sub(stand_in, value)
        return value

    return cleaned(value)


def _names() -> Iterator[tuple[re.Pattern[str], str]]:
    folders = {"CLONE": Path(__file__).resolve().parents[2], "CWD": Path.cwd(), "TMP": Path(tempfile.gettempdir())}
    folders["HOME"] = Path.home()
    # The longest first: a clone is often in a home.
    for name, folder in sorted(folders.items(), key=lambda item: -len(str(item[1]))):
        if len(folder.parts) > 1:
            yield re.compile(rf"{re.escape(str(folder))}(?![\w-])"), name
    host = platform.node()
    for name in {host, host.partition(".")[0]} - {"", "localhost"}:
        yield re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])"), "HOST"
    user = _user()
    if user:
        # As part of a path, or before a machine: elsewhere a short name may be a word.
        yield re.compile(rf"(?<=/){re.escape(user)}(?=/|$|\W)|(?<![\w-]){re.escape(user)}(?=@)"), "USER"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return ""


def page(report: Mapping[str, Any]) -> str:
    """The report in Markdown, on about one page."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    yield f"# Device check: {report.get('device', 'no device was opened')}"
    yield ""
    yield f"{report.get('backend', '?')}, {report.get('devices', 0)} in sight; {versions or 'no versions known'}"
    yield ""
    yield f"**{_VERDICTS[report['severity']]}** ({report['seconds'] / 60:.1f} minutes)"
    yield ""
    yield "| part | what | | s |"
    yield "|---|---|---|---:|"
    for part in report["parts"]:
        state = part["state"] + (f": {_cell(part['why'])}" if part["why"] else "")
        yield f"| {part['name']} | {part['what']} | {state} | {part['seconds']:.0f} |"
    findings = [finding for finding in report["findings"] if finding["name"] != "part"]
    for title, wanted in (
        ("What was measured", [one for one in findings if one["area"] in _MEASURED and one["severity"] == "good"]),
        ("What is wrong or slow", [one for one in findings if one["severity"] in ("broken", "degraded")]),
        ("What falls back, or is not here", [one for one in findings if one["severity"] == "fallback"]),
    ):
        if wanted:
            yield ""
            yield f"## {title}"
            yield ""
            yield from (_item(finding) for finding in wanted)
    good = sum(finding["severity"] == "good" for finding in findings)
    yield ""
    yield f"{good} findings are good; the JSON beside this page has all of them."


_MEASURED = ("goldens", "speed", "align", "peak memory", "resume", "throughput", "collectives", "workers")


def _item(finding: Mapping[str, Any]) -> str:
    fix = f" ({finding['fix']})" if finding["fix"] else ""
    return f"- {finding['area']}: {finding['name']}: {finding['seen']}{fix}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
