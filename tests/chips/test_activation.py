import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from zili.chips import activate, activation, apply_environment, find_backend
from zili.errors import ChipError


def names(settings):
    return {setting.name for setting in settings}


def test_defaults_are_set_and_the_users_own_values_win(bare):
    bare.setenv("HCCL_CONNECT_TIMEOUT", "7200")
    bare.setenv("HCCL_BUFFSIZE", "120")
    applied, kept = apply_environment(find_backend("ascend"))
    environment = activation.os.environ
    assert environment["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert environment["HCCL_EXEC_TIMEOUT"] == "3600"
    assert environment["HCCL_CONNECT_TIMEOUT"] == "7200"
    assert names(kept) == {"HCCL_CONNECT_TIMEOUT", "HCCL_BUFFSIZE"}
    assert "HCCL_BUFFSIZE" not in names(applied)
    assert "INF_NAN_MODE_ENABLE" not in environment, "left to the vendor's default"
    assert all(setting.reason for setting in (*applied, *kept))


def test_what_slows_is_set_in_deterministic_mode_only(bare):
    apply_environment(find_backend("ascend"))
    assert "HCCL_DETERMINISTIC" not in activation.os.environ
    apply_environment(find_backend("ascend"), deterministic=True)
    assert activation.os.environ["HCCL_DETERMINISTIC"] == "true"


def test_an_older_name_of_a_variable_counts_as_the_users_choice(bare):
    bare.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    applied, kept = apply_environment(find_backend("nvidia"))
    assert "PYTORCH_ALLOC_CONF" not in names(applied)
    assert names(kept) == {"PYTORCH_CUDA_ALLOC_CONF"}


def test_the_cpu_opens(bare):
    opened = activate(find_backend("cpu"))
    assert opened.device == torch.device("cpu")
    assert opened.count == 1
    assert opened.versions["torch"] == torch.__version__
    assert names(opened.applied) >= {"TORCH_DEVICE_BACKEND_AUTOLOAD"}


def test_variables_that_come_too_late_are_named(bare, monkeypatch):
    opened = activate(find_backend("cpu"))
    set_by_us = names(opened.applied) - {"TORCH_DEVICE_BACKEND_AUTOLOAD"}
    assert bool(opened.warnings) == bool(set_by_us)
    warning = activation._late_warning("torch", (activation.SetVariable("A_B", "1", "why"),))
    assert warning == (
        "torch was imported before A_B could be set; they may have no effect: call zili.setup before what imports "
        "torch, or set them where the program is started",
    )


def test_a_plugin_that_fails_to_import_gives_cause_and_fix(bare, install):
    install("torch_mlu", "raise ImportError('libcnnl.so: cannot open shared object file')")
    with pytest.raises(ChipError) as error:
        activate(find_backend("cambricon"))
    message = str(error.value)
    assert "torch_mlu cannot be imported" in message
    assert "libcnnl.so" in message
    assert "no device (/dev/cambricon_dev" in message
    assert "install the driver" in message


def test_an_absent_chip_is_an_error_and_not_a_fallback(bare):
    if torch.cuda.is_available():
        pytest.skip("the chip is here")
    with pytest.raises(ChipError, match="nvidia"):
        activate(find_backend("nvidia"))


class FakeAccelerator:
    """torch.accelerator of a process that holds `count` devices of one type."""

    def __init__(self, device_type: str, count: int) -> None:
        self.device_type, self.count, self.index = device_type, count, None

    def current_accelerator(self):
        return SimpleNamespace(type=self.device_type)

    def device_count(self):
        return self.count

    def set_device_index(self, index):
        self.index = index


def fake_torch(device_type: str, count: int) -> SimpleNamespace:
    return SimpleNamespace(accelerator=FakeAccelerator(device_type, count), device=torch.device)


def test_a_device_of_the_right_type_opens():
    world = fake_torch("cuda", 4)
    device, count = activation._open_device(world, find_backend("nvidia"), 3)
    assert (device, count, world.accelerator.index) == (torch.device("cuda", 3), 4, 3)


@pytest.mark.parametrize(
    ("world", "index", "message"),
    [
        (fake_torch("cuda", 4), 0, "torch is bound to cuda here; a process holds one accelerator"),
        (fake_torch("mlu", 0), 0, "cambricon is not here"),
        (fake_torch("mlu", 2), 2, r"device 2 asked for, 2 in sight \(0..1\).*MLU_VISIBLE_DEVICES"),
    ],
)
def test_a_device_that_cannot_be_had(world, index, message):
    with pytest.raises(ChipError, match=message):
        activation._open_device(world, find_backend("cambricon"), index)


ORDER = """
import sys
from zili.chips import activate, catalog, choose, detect, find_chip
detect(), choose(), catalog(), find_chip("910b2")
assert "torch" not in sys.modules
opened = activate(choose("cpu").backend)
assert "torch" in sys.modules
assert not opened.warnings, opened.warnings
"""


def test_a_plugin_without_its_driver_does_not_stop_the_cpu(install, bare):
    """`import torch` fails beside such a plugin; activating the CPU first does not."""
    site = install(
        "torch_broken",
        "def load():\n    raise ImportError('libhccl.so: cannot open shared object file')\n",
        entry_points="[torch.backends]\ntorch_broken = torch_broken:load\n",
    )
    environment = {**activation.os.environ, "PYTHONPATH": str(site)}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert "Failed to load the backend extension" in run("import torch").stderr
    finished = run(ORDER)
    assert finished.returncode == 0, finished.stderr


def test_what_was_set_before_a_fork_is_still_ours(bare):
    """A worker of `zili launch` is a fork of a process that has set the environment and imported torch."""
    first, _ = apply_environment(find_backend("ascend"))
    bare.setenv("HCCL_CONNECT_TIMEOUT", "7200")
    again, kept = apply_environment(find_backend("ascend"))
    assert names(again) == names(first) - {"HCCL_CONNECT_TIMEOUT"} and names(kept) == {"HCCL_CONNECT_TIMEOUT"}
    activate(find_backend("cpu"))
    assert not activate(find_backend("cpu")).warnings, "they were set in time, or it was said before"
