import pytest

from zili.chips import CAPABILITIES, Backend, Capability, find_backend, registry
from zili.errors import ChipError

NAMES = ("ascend", "cambricon", "nvidia", "cpu")

ACME = """
from zili.chips import Backend, Capability, Variable

RECORD = Backend(
    name="{name}",
    device_type="{device}",
    collectives="xccl",
    plugin="acme_torch",
    install="pip install acme_torch",
    environment=(Variable("ACME_FAST", "1", "it is slow otherwise"),),
    capabilities={{"bf16": Capability(True, "data sheet", "documented")}},
)
"""


def entry(name: str, target: str) -> str:
    return f"[zili.chips]\n{name} = {target}\n"


@pytest.mark.parametrize(
    ("name", "device", "collectives", "plugin"),
    [
        ("cpu", "cpu", "gloo", None),
        ("nvidia", "cuda", "nccl", None),
        ("ascend", "npu", "hccl", "torch_npu"),
        ("cambricon", "mlu", "cncl", "torch_mlu"),
    ],
)
def test_the_four_backends(name, device, collectives, plugin):
    backend = find_backend(name)
    assert (backend.device_type, backend.collectives, backend.plugin) == (device, collectives, plugin)
    assert find_backend(device) is backend
    assert find_backend(name.upper()) is backend


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(ChipError, match=r"'ascent'.*did you mean ascend"):
        find_backend("ascent")
    with pytest.raises(ChipError, match=r"known: .*cambricon.*cpu"):
        find_backend("tpu9000")


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_answers_every_capability_with_a_reason(name):
    backend = find_backend(name)
    assert set(backend.capabilities) == set(CAPABILITIES)
    for capability in CAPABILITIES:
        answer = backend.capability(capability)
        assert isinstance(answer.value, bool)
        assert answer.reason
    for variable in backend.environment:
        assert variable.reason


def test_only_the_cpu_claims_to_have_been_run():
    for name in ("ascend", "cambricon", "nvidia"):
        backend = find_backend(name)
        assert all(backend.capability(key).evidence != "run" for key in CAPABILITIES)


def test_capabilities_are_asked_for_by_name():
    backend = Backend(name="x", device_type="x", collectives="x")
    assert not backend.capability("fsdp2").value
    assert "does not state" in backend.capability("fsdp2").reason
    changed = {"fsdp2": Capability(True, "this model has it")}
    assert backend.capability("fsdp2", changed).value
    with pytest.raises(ChipError, match="did you mean bf16"):
        backend.capability("bf61")


def test_a_package_adds_a_backend(install):
    install("acme", ACME.format(name="acme", device="xyz"), entry_points=entry("acme", "acme:RECORD"))
    backend = find_backend("acme")
    assert find_backend("xyz") == backend
    assert backend.capability("bf16").value
    names = [known.name for known in registry().backends]
    assert names == ["ascend", "cambricon", "nvidia", "acme", "cpu"], "the CPU is the last to be chosen"
    assert not registry().refused


@pytest.mark.parametrize(
    ("name", "device", "holder"),
    [("acme", "npu", "ascend"), ("cambricon", "xyz", "cambricon"), ("acme", "cpu", "cpu"), ("mlu", "x", "cambricon")],
)
def test_a_package_that_claims_a_taken_name_is_refused(install, name, device, holder):
    install("acme", ACME.format(name=name, device=device), entry_points=entry("acme", "acme:RECORD"))
    with pytest.raises(ChipError, match=rf"package acme is refused: {holder} .*uninstall or rename"):
        find_backend(name)
    assert len(registry().backends) == len(NAMES)


def test_two_packages_that_claim_one_device_type(install):
    install("acme", ACME.format(name="acme", device="xyz"), entry_points=entry("acme", "acme:RECORD"))
    install("bolt", ACME.format(name="bolt", device="xyz"), entry_points=entry("bolt", "bolt:RECORD"))
    first, second = sorted(("acme", "bolt"), key=lambda name: name in registry().refused)
    assert find_backend(first).device_type == "xyz"
    with pytest.raises(ChipError, match=rf"{first} .xyz. has 'xyz' already"):
        find_backend(second)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise OSError('libacme.so is missing')", "cannot be loaded.*libacme.so is missing.*uninstall acme"),
        ("OTHER = 1", "cannot be loaded.*RECORD"),
        ("RECORD = {'name': 'acme'}", "is not a zili.chips.Backend"),
    ],
)
def test_a_broken_package_is_refused_and_hides_no_other(install, code, message):
    install("acme", code, entry_points=entry("acme", "acme:RECORD"))
    with pytest.raises(ChipError, match=message):
        find_backend("acme")
    assert find_backend("cpu").name == "cpu"
