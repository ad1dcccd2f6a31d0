"""The alert rules and the dashboard of deploy/ ask for figures that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from deployed import BOARD, OF_EXPORTERS, RULES, RUNBOOK, alerts, names_in, queries

from zili.exposition import METRICS


def test_each_alert_asks_for_figures_that_there_are() -> None:
    found = alerts()
    assert len(found) == RULES.read_text(encoding="utf-8").count("- alert:") >= 10
    for name, expression in found.items():
        assert names_in(expression) <= METRICS.keys() | OF_EXPORTERS, name
        assert names_in(expression), name


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


FIRES = {
    "ZiliRunGone": {'zili_step{run="a"}': "7 7 _x30", 'zili_planned_steps{run="a"}': "9 9 _x30"},
    "ZiliMachineSilent": {'zili_machines{run="a"}': "2x30", 'zili_node_working{run="a", node="x"}': "1x30"},
    "ZiliNoStep": {'zili_last_step_timestamp_seconds{run="a"}': "60x30", 'zili_step_seconds{run="a"}': "12x30"},
    "ZiliProcessStands": {'zili_process_quiet_seconds{run="a", rank="3"}': "0+60x30"},
    "ZiliLossNotFinite": {'zili_loss{run="a"}': f"2 {'NaN ' * 30}", 'zili_grad_norm{run="a"}': "1x30"},
    "ZiliLossSpike": {'zili_loss{run="a"}': f"{'2 2.1 ' * 12} 9x6"},
    "ZiliGradNormSpike": {'zili_grad_norm{run="a"}': f"{'1 ' * 22} 30x8"},
    "ZiliCheckpointOld": {'zili_checkpoint_age_seconds{run="a"}': "6000+120x30"},
    "ZiliRestartsOften": {'zili_restarts_total{run="a"}': f"{'0 ' * 10} 1 2 3 4x20"},
    "ZiliMachineLeftOut": {'zili_machine_left_out{run="a", node="x"}': "1x30"},
    "ZiliGoodputLow": {'zili_goodput_ratio{run="a"}': "0.5x30", 'zili_phase_seconds{run="a", phase="step"}': "7200x30"},
    "ZiliStraggler": {'zili_straggler{run="a", rank="3", phase="data"}': "_x20 1x10"},
    "ZiliProcessSlow": {
        **{f'zili_process_step_seconds{{run="a", rank="{rank}"}}': "1x30" for rank in "012"},
        'zili_process_step_seconds{run="a", rank="3"}': "1.2x30",
    },
    "ZiliWaitsForData": {
        'zili_process_phase_seconds_total{run="a", phase="data"}': "0+12x30",
        'zili_process_phase_seconds_total{run="a", phase="step"}': "0+48x30",
    },
    "ChipFault": {'DCGM_FI_DEV_XID_ERRORS{instance="x"}': "0 0 79x30"},
    "ChipUnhealthy": {'npu_chip_info_health_status{instance="x"}': "0x30"},
}
"""By alert, series of half an hour, a value a minute, at whose end it fires."""
CALM = {
    **{'zili_step{run="a"}': "1+1x30", 'zili_planned_steps{run="a"}': "900x30", 'zili_machines{run="a"}': "2x30"},
    **{'zili_node_working{run="a", node="x"}': "1x30", 'zili_node_working{run="a", node="y"}': "1x30"},
    **{'zili_last_step_timestamp_seconds{run="a"}': "0+60x30", 'zili_step_seconds{run="a"}': "60x30"},
    **{'zili_process_quiet_seconds{run="a", rank="0"}': "30x30", 'zili_loss{run="a"}': "3-0.01x30"},
    **{'zili_grad_norm{run="a"}': "1 2 1 3 1 2 1x24", 'zili_checkpoint_age_seconds{run="a"}': "60x30"},
    **{'zili_restarts_total{run="a"}': "0 0 1x28", 'zili_goodput_ratio{run="a"}': "0.97x30"},
    **{
        'zili_process_step_seconds{run="a", rank="0"}': "60x30",
        'zili_process_step_seconds{run="a", rank="1"}': "63x30",
    },
    **{'zili_process_phase_seconds_total{run="a", phase="data"}': "0+1x30"},
    **{'zili_process_phase_seconds_total{run="a", phase="step"}': "0+59x30", "npu_chip_info_health_status": "1x30"},
    **{'DCGM_FI_DEV_XID_ERRORS{instance="x"}': "0x30", 'zili_phase_seconds{run="a", phase="step"}': "7200x30"},
}
"""A run to which nothing happens."""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: Debian's package prometheus")
def test_each_alert_fires_where_it_is_meant_to_and_not_in_a_calm_run(tmp_path: Path) -> None:
    assert FIRES.keys() == alerts().keys()
    fired = {name: fires(tmp_path, series) for name, series in {**FIRES, "calm": CALM}.items()}
    assert fired == {**{name: {name} for name in FIRES}, "calm": set()}


def fires(folder: Path, series: dict[str, str]) -> set[str]:
    """Alerts that fire after 30 minutes of `series`, as promtool finds those that nobody expected."""
    given = [{"series": name, "values": values} for name, values in series.items()]
    expected = [{"eval_time": "30m", "alertname": name, "exp_alerts": []} for name in alerts()]
    test = {"interval": "1m", "input_series": given, "alert_rule_test": expected}
    file = folder / "test.json"  # which is YAML too
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}), "utf-8")
    done = subprocess.run(["promtool", "test", "rules", str(file)], check=False, capture_output=True, text=True)
    assert done.returncode in (0, 1) and "error" not in done.stderr.lower(), done
    return set(re.findall(r"alertname: (\w+), time: 30m,", done.stdout + done.stderr))
