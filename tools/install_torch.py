"""Installs PyTorch for `make quickstart` and `make test`: the small build where that is all this machine can use.

On Linux an index's default build of torch is mostly the one for CUDA, several GB with its libraries, which a machine
without an NVIDIA device has no use for: the CPU build is looked for first, in the indexes that pip is configured with,
then in the one that pytorch.org names. It needs nothing but Python and pip.

    python tools/install_torch.py [options of pip]

With options it is left to pip and to them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

VERSION = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_SOON = ("--retries", "0", "--timeout", "15")
"""Options of pip for an index that may not be reachable from here."""


def has_nvidia() -> bool:
    """Whether the driver shows a device: natively, or in Windows' Linux."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/usr/lib/wsl/lib/nvidia-smi").exists()


def attempts(options: list[str], *, linux: bool, nvidia: bool, cpu_index: str = CPU_INDEX) -> list[list[str]]:
    """Arguments of `pip install`, to be tried one after the other; the last may fail."""
    plain = [*options, f"torch=={VERSION}"]
    if options or nvidia or not linux:
        return [plain]
    cpu = f"torch=={VERSION}+cpu"
    return [[cpu], [*_SOON, "--extra-index-url", cpu_index, cpu], plain]


def install(wanted: Iterable[list[str]], python: str = sys.executable) -> int:
    """The exit code of the last attempt that was made; only that one's complaints are shown."""
    *first, last = wanted
    for arguments in first:
        if _pip(python, arguments, quiet=True) == 0:
            return 0
    if first:
        print(
            f"no index at hand has the CPU build of torch {VERSION}: taking the default one, on Linux several GB for "
            "CUDA. To avoid it: make TORCH_OPTIONS='--index-url URL' with the CPU index that pytorch.org names",
            file=sys.stderr,
            flush=True,
        )
    return _pip(python, last, quiet=False)


def _pip(python: str, arguments: list[str], *, quiet: bool) -> int:
    command = [python, "-m", "pip", "install", "--quiet", *arguments]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL if quiet else None).returncode


if __name__ == "__main__":
    sys.exit(install(attempts(sys.argv[1:], linux=sys.platform.startswith("linux"), nvidia=has_nvidia())))
