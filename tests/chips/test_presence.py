import dataclasses
import importlib.metadata

import pytest

import zili.chips.presence as presence_module
from zili.chips import choose, detect, find_backend, registry
from zili.chips.presence import installed_versions, presence
from zili.errors import ChipError

TORCH = importlib.metadata.version("torch").split("+")[0]


@pytest.fixture
def card(install, bare, tmp_path):
    """The Ascend record on a machine that has, step by step, plugin, two device files and the runtime library."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "lib").mkdir()
    bare.setenv("LD_LIBRARY_PATH", str(tmp_path / "lib"))
    record = dataclasses.replace(
        find_backend("ascend"), plugin="torch_acme", device_nodes=str(tmp_path / "dev" / "acme[0-9]*")
    )

    class Card:
        backend = record

        def plug_in(self, version: str = TORCH) -> None:
            install("torch_acme", "", version=version)

        def add_devices(self, count: int = 2) -> None:
            for index in range(count):
                (tmp_path / "dev" / f"acme{index}").touch()
            (tmp_path / "dev" / "acme_manager").touch()

        def add_runtime(self) -> None:
            (tmp_path / "lib" / "libascendcl.so").touch()

    return Card()


def test_the_cpu_is_always_here():
    rows = {found.backend.name: found for found in detect()}
    assert set(rows) >= {"cpu", "nvidia", "ascend", "cambricon"}
    assert rows["cpu"].here
    assert rows["cpu"].count == 1
    for found in rows.values():
        assert found.here or (found.reason and found.fix)


def test_what_is_missing_is_said_in_the_order_of_installation(card):
    found = presence(card.backend)
    assert (found.here, found.reason) == (False, "torch_acme is not installed")
    assert "pip install" in found.fix
    card.plug_in()
    assert "no device" in presence(card.backend).reason
    card.add_devices()
    found = presence(card.backend)
    assert (found.here, found.reason) == (False, "libascendcl.so is not on LD_LIBRARY_PATH")
    assert "set_env.sh" in found.fix
    card.add_runtime()
    found = presence(card.backend)
    assert (found.here, found.count) == (True, 2)


def test_a_plugin_for_another_torch(card):
    card.plug_in(version="2.1.0")
    found = presence(card.backend)
    assert not found.here
    assert "torch_acme 2.1 does not pair with torch 2.13" in found.reason


@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("0,1,2,3", 2), ("", 0), ("-1", 0)])
def test_hidden_devices_do_not_count(card, bare, visible, count):
    card.plug_in()
    card.add_devices()
    card.add_runtime()
    bare.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    found = presence(card.backend)
    assert (found.count, found.here) == (count, count > 0)
    assert found.here or f"ASCEND_RT_VISIBLE_DEVICES={visible!r}" in found.fix


def test_a_broken_installation_does_not_hide_the_others(monkeypatch):
    def broken(name):
        raise ValueError(f"{name}.__spec__ is None")

    monkeypatch.setattr(presence_module.importlib.util, "find_spec", broken)
    rows = {found.backend.name: found for found in detect()}
    assert rows["cpu"].here
    assert "cannot be examined: ValueError" in rows["ascend"].reason


def test_auto_takes_the_cpu_where_nothing_else_is_and_says_so(monkeypatch):
    monkeypatch.setattr(presence_module, "_missing_software", lambda b: ("gone", "") if b.plugin else None)
    monkeypatch.setattr(presence_module, "_device_count", lambda b: int(b.name == "cpu"))
    backend, reason = choose()
    assert backend.name == "cpu"
    assert "no other chip was found" in reason


def test_auto_prefers_a_chip_and_names_the_others(monkeypatch):
    monkeypatch.setattr(presence_module, "_missing", lambda b: None)
    monkeypatch.setattr(presence_module, "_device_count", lambda b: 8)
    backend, reason = choose()
    assert backend == registry().backends[0]
    assert "8 devices" in reason
    assert "also here: cambricon, nvidia" in reason


def test_a_chip_asked_for_and_absent(monkeypatch):
    monkeypatch.setattr(presence_module, "_installed", lambda module: False)
    with pytest.raises(ChipError, match=r"ascend cannot be used here: torch_npu is not installed; pip install"):
        choose("ascend")
    with pytest.raises(ChipError, match="cambricon cannot be used here: torch_mlu is not installed"):
        choose("mlu")


def test_a_torch_built_without_the_device(monkeypatch, tmp_path):
    for line, built in (("cuda: Optional[str] = None", False), ("cuda: Optional[str] = '13.0'", True)):
        (tmp_path / "version.py").write_text(f"debug = False\n{line}\nhip = '6.0'\n")
        spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
        monkeypatch.setattr(presence_module.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert presence_module._torch_built_with("cuda") is built


def test_a_name_is_taken_at_its_word_once_its_software_is_here(card, monkeypatch):
    card.plug_in()
    monkeypatch.setattr(presence_module, "find_backend", lambda name: card.backend)
    assert choose("ascend") == (card.backend, "asked for"), "only activation knows: WSL has no device files"


def test_driver_and_runtime_say_what_version_they_are(monkeypatch, tmp_path):
    (tmp_path / "x86_64-linux").mkdir()
    (tmp_path / "x86_64-linux" / "ascend_toolkit_install.info").write_text("package_name=toolkit\nversion=8.2.RC1\n")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    assert installed_versions(find_backend("ascend"))["CANN"] == "8.2.RC1"
    (tmp_path / "version.txt").write_text("Neuware Version 3.15.4\n")
    monkeypatch.setenv("NEUWARE_HOME", str(tmp_path))
    assert installed_versions(find_backend("cambricon")) == {"Neuware": "3.15.4"}
    monkeypatch.setenv("NEUWARE_HOME", str(tmp_path / "nowhere"))
    assert installed_versions(find_backend("cambricon")) == {}
    proc = tmp_path / "nvidia"
    proc.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build\n")
    (file,) = find_backend("nvidia").version_files
    monkeypatch.setattr(presence_module.os.path, "expandvars", lambda path: path.replace(file.paths[0], str(proc)))
    assert installed_versions(find_backend("nvidia")) == {"driver": "560.35.03"}
