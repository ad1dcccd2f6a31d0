"""Writes the table of verdicts into docs/operations.md: `python tools/verdict_table.py`. A test fails where the page is
behind the rules (tests/supervision/test_verdicts.py)."""

from __future__ import annotations

from pathlib import Path

from zili.errors import NoProgressError
from zili.supervision import verdicts
from zili.supervision.rules import ACTIONS, FaultRule, rules

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
BEGIN, END = "<!-- the verdicts: python tools/verdict_table.py -->\n", "<!-- the verdicts end -->\n"
KINDS = {
    "device": "A device, or a kernel on it",
    "host": "The machine around it",
    "memory": "Memory of a device or of the machine",
    "network": "The network, or a process at its other end",
    "storage": "Disks and file servers",
    "checkpoint": "Checkpoints",
    "data": "Data",
    "numerics": "Numbers",
    "code": "The program",
    "configuration": "What a person set",
    "preemption": "Nobody's fault",
    "unknown": "What no rule knows",
}


def verdict_table() -> str:
    """What history decides, then every rule by the kind of its fault."""
    parts = [_history()]
    for kind, title in KINDS.items():
        inside = [rule for rule in rules() if rule.kind == kind]
        head = f"\n#### {title}\n\n| rule | what is seen | Zili does | you do |\n|---|---|---|---|\n"
        parts.append(head + "".join(map(_row, inside)))
    return "\n".join(parts) + "\n"


def _row(rule: FaultRule) -> str:
    does = rule.action.replace("_", " ")
    if rule.at_start is not None and rule.at_start != rule.action:
        also = "".join(f", in `{phase}`" for phase in rule.also_in)
        does = f"{rule.at_start.replace('_', ' ')} before the first step{also}, else {does}"
    if rule.consequence:
        does += "; seeks the cause in other processes"
    return f"| {rule.name} | {_sentence(rule.says)} | {does} | {rule.hint} |\n"


def _sentence(says: str) -> str:
    return says[0].upper() + says[1:]


def _history() -> str:
    restarts, again = verdicts.RESTARTS_WITHOUT_A_STEP, verdicts.FAULTS_OF_A_MACHINE
    devices, code = verdicts.DEVICE_FAULTS_OF_A_MACHINE, NoProgressError.exit_code
    blamed = f"a machine's {devices}nd fault of a device or of its own, or its {again}rd that could be its own"
    rows = [
        (
            f"{restarts} restarts in a row without a new step",
            f"stop, exit code {code}: schedulers do not requeue it",
        ),
        (blamed, "replace that machine"),
        (
            "the same failure after the same step again, wherever data or code can be to blame; kills without a word "
            "do not count",
            f"roll back if the recipe allows to skip data, else stop with exit code {code}",
        ),
        ("anything else", "what the failure's own rule says, below"),
    ]
    actions = "".join(f"| {name.replace('_', ' ')} | {meaning} |\n" for name, meaning in ACTIONS.items())
    history = "".join(f"| {seen} | {does} |\n" for seen, does in rows)
    return f"\n| action | meaning |\n|---|---|\n{actions}\n| the run so far | Zili does |\n|---|---|\n{history}"


def with_table(page: str) -> str:
    """The page, with the table as the rules are now."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + verdict_table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
