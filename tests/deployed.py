"""What deploy/ asks Prometheus for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "zili.rules.yml"
BOARD = DEPLOY / "grafana" / "zili.json"
RUNBOOK = DEPLOY.parent / "docs" / "operations.md"
OF_EXPORTERS = {"DCGM_FI_DEV_XID_ERRORS", "npu_chip_info_error_code", "npu_chip_info_health_status"}
"""Names of the vendors' own exporters, as their documents have them."""


def alerts() -> dict[str, str]:
    """Expressions by alert."""
    text = RULES.read_text(encoding="utf-8")
    return dict(re.findall(r"- alert: (\w+)\n(?:\s*#[^\n]*\n)*\s*expr: ([^\n]+)\n", text))


def queries(board: dict[str, Any]) -> Iterator[str]:
    """Every query of the dashboard, its variables' and annotations' too."""
    yield from (one["expr"] for panel in board["panels"] for one in panel["targets"])
    yield from (one["definition"] for one in board["templating"]["list"] if one["type"] == "query")
    yield from (one["expr"] for one in board["annotations"]["list"])


def names_in(expression: str) -> set[str]:
    """Names of metrics: what stands before labels, a range or a bracket's end, and is no word of PromQL."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"|label_values", " ", expression)
    bare = re.sub(r"\b(?:by|without|on|group_left)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"(?<![\w$])[A-Za-z_]\w*(?!\w*\s*\()", bare)
    return set(words) - {"or", "and", "unless", "bool", "Inf", "NaN", "offset", "up", "run"}
