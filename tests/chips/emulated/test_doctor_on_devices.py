"""`zili doctor` on emulated devices: sound ones are called sound, and every planted fault is found and named."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from emulated import FAULTS
from forks import zili
from plugins import ASCEND, CAMBRICON, UNHEARD_OF, Environment, Vendor


class Report(dict[str, Any]):
    """What `zili doctor --json` printed, and its exit code."""

    code: int
    seconds: float

    def bad(self) -> list[dict[str, Any]]:
        """But for processes that were slower than others, as any may be beside other work."""
        found = [finding for finding in self["findings"] if finding["severity"] in ("degraded", "broken")]
        return [finding for finding in found if finding not in self.slow()]

    def slow(self) -> list[dict[str, Any]]:
        """Processes that were."""
        degraded = [finding for finding in self["findings"] if finding["severity"] == "degraded"]
        return [finding for finding in degraded if finding["name"].startswith("process ")]


def doctor(
    vendor: Vendor,
    with_plugins: Environment,
    folder: Path,
    *faults: dict[str, Any],
    only: str = "",
    processes: int = 2,
    patience: int = 60,
) -> Report:
    environment = with_plugins(vendor, **{FAULTS: json.dumps(faults)})
    words = ["doctor", "--json", "--chip", vendor.backend, "--processes", str(processes), "--folder", str(folder)]
    words += ["--only", only] if only else []
    started = time.monotonic()
    finished = zili(*words, "--patience", patience, environment=environment)
    assert finished.stdout.startswith("{"), finished.stderr
    report = Report(json.loads(finished.stdout))
    report.code, report.seconds = finished.returncode, time.monotonic() - started
    return report


@pytest.mark.parametrize(
    "vendor",
    [ASCEND, pytest.param(CAMBRICON, marks=pytest.mark.slow), pytest.param(UNHEARD_OF, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_sound_device(vendor: Vendor, with_plugins: Environment, tmp_path: Path) -> None:
    report = doctor(vendor, with_plugins, tmp_path)
    assert report.bad() == [] and report.code == (9 if report.slow() else 0)
    assert (report["backend"], report["device"], report["devices"]) == (vendor.backend, vendor.chip, 8)
    areas = {finding["area"] for finding in report["findings"]}
    assert areas == {"here", "numbers", "capabilities", "speed", "repeatability", "disk", "collectives", "workers"}
    tried = report["capabilities"]
    assert tried.pop("compile")["works"] is False, "torch compiles for no device it does not know"
    assert tried.pop("bf16")["works"] in (True, False), "whether the CPU below is faster in bf16"
    assert tried.pop("grouped_heads_attention")["works"] is (vendor is not CAMBRICON), "which is known to refuse them"
    assert len(tried) == 6 and all(found["works"] is True for found in tried.values()), tried
    figures = {finding["name"]: finding["figures"] for finding in report["findings"]}
    assert figures["matmul fp32"]["1024 FLOP/s"] > 1e9 and figures["memory"]["bytes/s"] > 1e8
    kinds = [name for name in figures if name.endswith("among 2")]
    assert len(kinds) == 6 and all(figures[name]["bytes/s"] > 0 for name in kinds)
    if vendor is ASCEND:
        assert "attention (npu) in bf16" in figures and "permute (npu) in bf16" in figures


def test_faults_of_operations_are_found_and_named(with_plugins: Environment, tmp_path: Path) -> None:
    report = doctor(
        *(CAMBRICON, with_plugins, tmp_path),
        {"operation": "aten::exp", "kind": "round", "amount": 22},  # of fp32's 24 bits, cut instead of rounded
        {"operation": "aten::rsqrt", "kind": "scale", "amount": 1e-3},
        {"operation": "aten::tanh", "kind": "raise"},
        only="numbers",
    )
    assert report.code == 10
    named = {finding["name"]: finding["seen"] for finding in report.bad()}
    assert "forward" in named["exp in fp32"] and "ulp off" in named["exp in fp32"]
    assert "forward" in named["rsqrt in fp32"]
    assert "no kernel for aten::tanh" in named["tanh in fp32"]
    # What is made of them shows it too; nothing else does.
    assert {name.split(" in ")[0] for name in named} <= {
        *("exp", "rsqrt", "tanh", "rms_norm (reference)", "add_rms_norm (reference)"),
        *("linear_cross_entropy (reference)", "linear_cross_entropy (chunked)"),
    }


def test_a_kernel_that_is_missing_does_not_cost_the_report(with_plugins: Environment, tmp_path: Path) -> None:
    fault = {"operation": "aten::index_add", "kind": "raise"}
    report = doctor(CAMBRICON, with_plugins, tmp_path, fault, only="repeatability")
    (finding,) = report.bad()
    assert finding["area"] == "repeatability" and "no kernel for aten::index_add" in finding["seen"]


def test_what_the_record_promises_and_the_chip_does_not_keep_is_found(
    with_plugins: Environment, tmp_path: Path
) -> None:
    report = doctor(
        *(CAMBRICON, with_plugins, tmp_path),
        {"operation": "aten::_fused_adamw_", "kind": "raise"},
        *({"operation": f"aten::{name}", "kind": "saturate"} for name in ("mul", "mm", "exp", "div")),
        {"operation": "aten::_grouped_mm", "kind": "raise"},  # the record promises none
        only="capabilities",
    )
    assert report.code == 10
    found = {finding["name"]: finding for finding in report["findings"] if finding["area"] == "capabilities"}
    assert {name for name, finding in found.items() if finding["severity"] == "broken"} == {"fused_adamw", "inf_nan"}
    assert "no kernel for aten::_fused_adamw_" in found["fused_adamw"]["seen"]
    assert "set chip.capabilities.fused_adamw = false: AdamW updates by its loop" in found["fused_adamw"]["fix"]
    assert "3e38 * 10, a product of 3e38, exp(100), 0 / 0: finite" in found["inf_nan"]["seen"]
    assert (
        found["grouped_matmul"]["severity"] == "fallback" and "one after the other" in found["grouped_matmul"]["seen"]
    )


def test_what_fails_only_among_many_is_found(with_plugins: Environment, tmp_path: Path) -> None:
    fault = {"operation": "reduce_scatter", "kind": "drop"}
    report = doctor(CAMBRICON, with_plugins, tmp_path, fault, only="collectives")
    bad = {finding["name"]: finding["fix"] for finding in report.bad()}
    assert bad.keys() == {"reduce_scatter among 2", "bf16_reduce", "fsdp2"}
    assert "chip.capabilities.fsdp2 = false: parallel.shards" in bad["fsdp2"]


@pytest.mark.slow
def test_a_dropped_reduction_is_found(with_plugins: Environment, tmp_path: Path) -> None:
    report = doctor(
        ASCEND,
        with_plugins,
        tmp_path,
        {"operation": "all_reduce", "kind": "drop", "rank": 1},
        only="collectives",
        patience=10,
    )
    assert report.code == 10
    assert any("all_reduce" in finding["name"] for finding in report.bad()), report.bad()


@pytest.mark.slow
def test_a_slow_process_is_named(with_plugins: Environment, tmp_path: Path) -> None:
    fault = {"operation": "all_reduce", "kind": "slow", "amount": 0.1, "rank": 2}
    report = doctor(ASCEND, with_plugins, tmp_path, fault, only="collectives", processes=3)
    assert "process 2" in [finding["name"] for finding in report.slow()]
    assert report.code == 9


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        pytest.param({"kind": "slow", "amount": 1000}, "process 1 did not take part in all_gather among 2", id="hangs"),
        pytest.param({"kind": "die"}, "process 1 ended with code 9 at all_gather among 2", id="dies"),
    ],
)
@pytest.mark.slow
def test_a_process_that_hangs_or_dies_is_named_in_time(
    fault: dict[str, Any], seen: str, with_plugins: Environment, tmp_path: Path
) -> None:
    report = doctor(
        ASCEND, with_plugins, tmp_path, {"operation": "all_gather", "rank": 1, **fault}, only="collectives", patience=10
    )
    (finding,) = report.bad()
    assert seen in finding["seen"] and finding["fix"], finding
    assert report.code == 10
    assert report.seconds < 300, "not in the 1000 seconds that it hangs"
