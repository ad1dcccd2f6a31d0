"""Libraries that stand for CANN, Huawei's runtime, so that its torch_npu wheel can be imported without it.

They answer every call with 0 and claim eight devices, which is all that FakeTensorMode needs: operations then go
through the wheel's own schemas, shape functions and autograd formulas, and nothing is computed. **Real operations on
them give wrong numbers without an error.** Whoever imports torch_npu on them must stay in FakeTensorMode.

`python stub_cann.py FOLDER` writes them; FOLDER belongs on LD_LIBRARY_PATH before torch_npu is imported.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

_MAIN = "libascendcl.so"
_LIBRARIES = (
    *(
        "libhccl.so",
        "libacl_op_compiler.so",
        "libge_runner.so",
        "libgraph.so",
        "libacl_tdt_channel.so",
        "libruntime.so",
    ),
    *("libmsprofiler.so", "libascend_hal.so", "libfmk_parser.so", "libascend_protobuf.so", "libatb.so"),
)
"""What the wheel is linked with or opens by name; each is the same library under another name."""

# What must do more than answer 0, for the wheel to come up and count eight devices with memory.
_ANSWERS = """
#include <stdlib.h>
#include <string.h>
static __thread int current = 0;
static int allocate(void **out, unsigned long bytes) { *out = 0; return posix_memalign(out, 512, bytes ? bytes : 512); }
int aclrtGetDeviceCount(unsigned *count) { *count = 8; return 0; }
int aclrtSetDevice(int device) { current = device; return 0; }
int aclrtGetDevice(int *device) { *device = current; return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B2"; }
const char *aclGetRecentErrMsg(void) { return "no CANN: these are stand-ins"; }
int aclrtGetMemInfo(int kind, unsigned long *unused, unsigned long *total) {
  *unused = 60UL << 30; *total = 64UL << 30; return 0; }
int aclrtMalloc(void **out, unsigned long bytes, int policy) { return allocate(out, bytes); }
int aclrtMallocAlign32(void **out, unsigned long bytes, int policy) { return allocate(out, bytes); }
int aclrtMallocHost(void **out, unsigned long bytes) { return allocate(out, bytes); }
int aclrtFree(void *block) { free(block); return 0; }
int aclrtFreeHost(void *block) { free(block); return 0; }
int aclrtCreateStream(void **stream) { *stream = malloc(64); return 0; }
int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flag) { *stream = malloc(64); return 0; }
int aclrtCreateEventExWithFlag(void **event, unsigned flag) { *event = malloc(64); return 0; }
int aclrtGetCurrentContext(void **context) { *context = (void *)64; return 0; }
unsigned long aclGetCompileoptSize(int option) { return 64; }
int aclGetCompileopt(int option, char *value, unsigned long bytes) { strcpy(value, "0"); return 0; }
"""
_ANSWERED = set(re.findall(r"\b(acl\w+)\(", _ANSWERS))
_OPENED_BY_NAME = re.compile(r"(acl(rt|op|mdl|tdt|prof|sys|dump|Get|Set|Dump|Data)|[Hh]ccl|rt[A-Z])[A-Za-z0-9_]+")


def write(folder: Path) -> None:
    """Compile the stand-ins into `folder`.

    Raises:
        OSError, subprocess.CalledProcessError: no C compiler, or no binutils.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages = Path(sysconfig.get_paths()["purelib"])
    wheel = [*(packages / "torch_npu").rglob("*.so")]
    names = _missing(wheel, [*(packages / "torch" / "lib").glob("*.so*")]) | _named_in(wheel)
    lines = [_ANSWERS]
    for name in sorted(names - _ANSWERED):
        # Of C++, virtual tables and type descriptions are data; everything else is called.
        lines.append(f"char {name}[256];" if name.startswith("_ZT") else f"long {name}() {{ return 0; }}")
    source = folder / "cann.c"
    source.write_text("\n".join(lines), encoding="utf-8")
    for library in (_MAIN, *_LIBRARIES):
        command = ["cc", "-w", "-shared", "-fPIC", "-o", str(folder / library), str(source)]
        subprocess.run([*command, f"-Wl,-soname,{library}"] if library != _MAIN else command, check=True)


def _missing(wheel: Iterable[Path], torch: Iterable[Path]) -> set[str]:
    """Symbols that the wheel wants and neither torch, the system nor Python has."""
    system = subprocess.run(["ldd", *map(str, torch)], capture_output=True, text=True, check=False).stdout
    there = {*torch, *wheel, *(Path(found) for found in re.findall(r"=> (/\S+)", system))}
    defined = {name for library in there for name, _ in _symbols(library, "--defined-only")}
    wanted = {name for library in wheel for name, kind in _symbols(library, "--undefined-only") if kind != "w"}
    return {name for name in wanted - defined if not name.startswith(("Py", "_Py"))}


def _symbols(library: Path, which: str) -> list[tuple[str, str]]:
    """Name, without its version, and nm's letter for its kind."""
    listing = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=False).stdout
    parts = [line.split() for line in listing.splitlines()]
    return [(words[-1].split("@")[0], words[-2]) for words in parts if len(words) >= 2]


def _named_in(wheel: Iterable[Path]) -> set[str]:
    """Functions whose names stand in the wheel's library as text: it looks them up when it runs."""
    (main,) = [library for library in wheel if library.name == "libtorch_npu.so"]
    words = re.findall(rb"[A-Za-z_][A-Za-z0-9_]{5,}", main.read_bytes())
    return {word.decode() for word in set(words) if _OPENED_BY_NAME.fullmatch(word.decode())}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
