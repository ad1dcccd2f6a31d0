import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from zili.chips import Device, activate, find_backend, find_chip


@pytest.fixture
def host():
    return Device(activate(find_backend("cpu")))


def test_the_host_as_a_device(host):
    assert host.type == "cpu"
    assert host.name()
    assert host.memory() is None
    host.synchronize()
    assert host.capability("fsdp2").value


def test_random_state_round_trip(host):
    host.seed(7)
    first = torch.rand(3)
    state = host.rng_state()
    drawn = torch.rand(3)
    assert host.set_rng_state(state), "all of it is restored"
    assert torch.equal(torch.rand(3), drawn)
    host.seed(7)
    assert torch.equal(torch.rand(3), first)


def test_state_of_another_kind_of_device_is_not_claimed_to_be_restored(host):
    state = {**host.rng_state(), "elsewhere": torch.zeros(16, dtype=torch.uint8)}
    assert not host.set_rng_state(state)


class Generators:
    """A vendor's device module with a generator of its own."""

    def __init__(self) -> None:
        self.state = torch.arange(4, dtype=torch.uint8)

    def get_device_name(self, index):
        return "Ascend910A"

    def get_rng_state(self, device):
        return self.state.clone()

    def set_rng_state(self, state, device):
        self.state = state

    def synchronize(self):
        pass


@pytest.fixture
def chip(monkeypatch):
    """A 910A that exists only as far as `Device` asks."""
    monkeypatch.setattr(torch, "get_device_module", lambda device: Generators())
    opened = activate(find_backend("cpu"))
    # meta stands in for a device type that this torch does not know.
    return Device(dataclasses.replace(opened, backend=find_backend("ascend"), device=torch.device("meta", 0)))


def test_a_device_keeps_its_own_generator(chip):
    state = chip.rng_state()
    assert set(state) == {"cpu", "meta"}
    chip._module.state = torch.zeros(4, dtype=torch.uint8)
    assert chip.set_rng_state(state)
    assert torch.equal(chip._module.state, torch.arange(4, dtype=torch.uint8))
    assert not chip.set_rng_state({"cpu": state["cpu"]}), "taken on another vendor's chip"


def test_the_model_at_hand_changes_what_the_backend_says(chip):
    assert chip.chip == find_chip("910a")
    assert find_backend("ascend").capability("bf16").value
    assert not chip.capability("bf16").value
    assert not chip.capability("inf_nan").value
    assert chip.capability("fused_adamw") == find_backend("ascend").capability("fused_adamw")


# torch can register a device without kernels from Python: enough for everything here that is not arithmetic.
PLUGIN = """
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
_setup_privateuseone_for_python_backend("{device}")
"""

RECORD = """
from zili.chips import Backend
BACKEND = Backend(name="acme", device_type="xyz", collectives="xccl", plugin="torch_acme")
"""

OPEN = """
from zili.chips import Device, activate, choose, find_backend
from zili.errors import ChipError

opened = activate(choose("{name}").backend)
assert str(opened.device) == "{device}:0", opened.device
assert "{plugin}" in opened.versions
device = Device(opened)
device.seed(1)
assert device.set_rng_state(device.rng_state())
assert device.memory() is None, "a plugin without an allocator"
try:
    activate(find_backend("{other}"))
except ChipError as error:
    assert "torch is bound to {device} here; a process holds one accelerator" in str(error), error
else:
    raise AssertionError("two accelerators in one process")
activate(find_backend("cpu"))
"""


@pytest.mark.parametrize(
    ("name", "device", "plugin", "other"),
    [
        ("ascend", "npu", "torch_npu", "cambricon"),
        ("cambricon", "mlu", "torch_mlu", "ascend"),
        ("acme", "xyz", "torch_acme", "cambricon"),
    ],
)
def test_a_registered_device_opens_by_its_record_alone(install, name, device, plugin, other):
    site = install(plugin, PLUGIN.format(device=device), version=torch.__version__.split("+")[0])
    if name == "acme":
        install("acme", RECORD, entry_points="[zili.chips]\nacme = acme:BACKEND\n")
    code = OPEN.format(name=name, device=device, plugin=plugin, other=other)
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
