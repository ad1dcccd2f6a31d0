"""The alert rules and the dashboard of deploy/ ask for figures that there are."""

from __future__ import annotations

import json
import re

from deployed import BOARD, OF_EXPORTERS, RULES, RUNBOOK, alerts, names_in, queries

from zili.exposition import METRICS


def test_each_alert_asks_for_figures_that_there_are() -> None:
    found = alerts()
    assert len(found) == RULES.read_text(encoding="utf-8").count("- alert:") >= 10
    for name, expression in found.items():
        assert names_in(expression) <= METRICS.keys() | OF_EXPORTERS, name
        assert names_in(expression) or name == "ZiliEndpointGone"


def test_each_query_of_the_dashboard_asks_for_figures_that_there_are() -> None:
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    asked = [names_in(query) for query in queries(board)]
    assert all(asked) and set().union(*asked) <= METRICS.keys()
    assert METRICS.keys() - set().union(*asked) == {"zili_process_step", "zili_checkpoint_step"}, "the rest is shown"
    for panel in board["panels"]:
        place, kind = panel["gridPos"], panel["type"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24 and kind in ("stat", "timeseries", "bargauge", "table")
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_panels_do_not_lie_upon_one_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(BOARD.read_text(encoding="utf-8"))["panels"]:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        own = {(column, row) for column in columns for row in rows}
        assert not own & taken, panel["title"]
        taken |= own


def test_a_name_that_there_is_not_would_be_found() -> None:
    assert names_in('sum by (run) (rate(zili_lost_total{run=~"$run"}[5m])) > 3 * quantile(0.5, zili_x)') == {
        *("zili_lost_total", "zili_x"),
    }


def test_the_runbook_has_every_figure_and_every_alert() -> None:
    page = RUNBOOK.read_text(encoding="utf-8")
    assert set(re.findall(r"`(zili_\w+)`", page)) == METRICS.keys()
    section = page.partition("| alert |")[2].partition("\n\n")[0]
    assert set(re.findall(r"\b[A-Z]\w+[a-z][A-Z]\w+", section)) == alerts().keys()
