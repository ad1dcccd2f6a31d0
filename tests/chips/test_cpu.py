import pytest

from zili.chips import cpu

INTEL = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx512f {}\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (INTEL.format(""), False),
        (INTEL.format("avx512_bf16"), True),
        (INTEL.format("amx_bf16 amx_tile"), True),
        (INTEL.format("avx512_fp16"), False),
        (ARM.format("svebf16"), False),
        (ARM.format("bf16"), True),
    ],
)
def test_bf16_units_by_flag(monkeypatch, tmp_path, text, value):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    answer = cpu.CPU.capability("bf16")
    assert answer.value is value
    assert "bf16 units" in answer.reason


def test_where_flags_cannot_be_read_fp32_is_the_choice(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "none")
    answer = cpu.CPU.capability("bf16")
    assert not answer.value
    assert "cannot be read" in answer.reason
    assert cpu.cpu_name()


def test_compile_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    answer = cpu.CPU.capability("compile")
    assert not answer.value
    assert "CXX" in answer.reason
