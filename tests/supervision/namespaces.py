"""Machines that are network namespaces of this one, on a switch whose cables can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

LAN = "lan"
"""Each machine's interface."""


def why_not() -> str:
    """Why no namespaces can be made here; "": they can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "namespaces need root and the command ip"
    probe = f"zili-{os.getpid()}-probe"
    made = _ip("netns", "add", probe)
    _ip("netns", "delete", probe)
    return "" if made.returncode == 0 else f"no namespaces here: {made.stderr.strip()}"


class Switch:
    """A namespace with a bridge, and one for each machine with an end of a cable that leads there."""

    def __init__(self, *machines: str) -> None:
        self.machines = machines

    def __enter__(self) -> Switch:
        try:
            self._make()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def host(self, machine: str) -> str:
        return f"10.213.0.{1 + self.machines.index(machine)}"

    def inside(self, machine: str) -> tuple[str, ...]:
        """The words before a command that runs it on `machine`."""
        return ("ip", "netns", "exec", _space(machine))

    def pull(self, machine: str) -> None:
        """Nothing comes from `machine` any more, nor reaches it: neither data nor the end of a connection."""
        self._set_port(machine, "down")

    def plug(self, machine: str) -> None:
        self._set_port(machine, "up")

    def _set_port(self, machine: str, state: str) -> None:
        _must("-n", _space("switch"), "link", "set", f"to-{machine}", state)

    def _make(self) -> None:
        own = _space("switch")
        _must("netns", "add", own)
        _must("-n", own, "link", "add", "bridge", "type", "bridge")
        _must("-n", own, "link", "set", "bridge", "up")
        for machine in self.machines:
            space, port = _space(machine), f"to-{machine}"
            _must("netns", "add", space)
            _must("-n", own, "link", "add", port, "type", "veth", "peer", "name", LAN, "netns", space)
            _must("-n", own, "link", "set", port, "master", "bridge", "up")
            _must("-n", space, "address", "add", f"{self.host(machine)}/24", "dev", LAN)
            for name in (LAN, "lo"):
                _must("-n", space, "link", "set", name, "up")

    def _end(self) -> None:
        for name in (*self.machines, "switch"):
            _ip("netns", "delete", _space(name))  # its interfaces go with it


def _space(name: str) -> str:
    return f"zili-{os.getpid()}-{name}"


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=False, capture_output=True, text=True, timeout=20)


def _must(*words: str) -> None:
    done = _ip(*words)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
