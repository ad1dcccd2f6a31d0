"""Checks that a release folder has not changed: its bytes, its tokenizer, and the answers of its model."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from zili.checksums import SUMS_FILE, changed, read_sums
from zili.data.pointers import what_it_is
from zili.data.tokenizer import Tokenizer
from zili.errors import CheckpointError
from zili.release.companions import is_our_code, tokenizer_of
from zili.release.opening import open_model
from zili.release.probe import TOLERANCE, Probe, answered, probe_of
from zili.release.record import RELEASE_FILE, Release, read_release
from zili.release.tensors import CastTensors

_READ = re.compile(
    r"(?s).*\.(py|safetensors|bin|gguf|pt|pth|model|jinja)"
    r"|.*\.index\.json|(config|generation_config|added_tokens|vocab|special_tokens_map|tokenizer.*|chat_template.*)\.json"
    r"|merges\.txt|adapter_.*"
)
"""Names that a library takes weights, tokenizer, template or code from. Of a name: it is short."""
_TEXT_BYTES = 100 << 20
_MANY = 8


@dataclass(frozen=True)
class Check:
    """One thing that was compared and held."""

    what: str
    detail: str


def verify_release(folder: Path, *, against: Path | None = None, transformers: bool | None = None) -> list[Check]:
    """Check a release folder; what is returned held.

    `against`: the run or checkpoint it was made from, to be computed again. `transformers`: compare with its classes
    too; None does where it is installed and the folder is not too large for it.

    Raises:
        CheckpointError: a file is missing or changed, or was added where a reader would take it, the tokenizer is
            another, or log-probabilities are others than those recorded. The first mismatch ends it.
    """
    if not (folder / RELEASE_FILE).is_file():
        raise CheckpointError(f"{folder} has no {RELEASE_FILE}: it is no release of `zili export`")
    findings = list(_check_files(folder))
    release, model = read_release(folder), open_model(folder)
    findings.append(_check_tokenizer(folder, release, tokenizer_of(folder)))
    found = answered(model, release.probe.ids, release.probe.text)
    findings.append(_compare("log-probabilities", found, release.probe, TOLERANCE, _recorded(release)))
    if against is not None:
        findings.append(_against(against, release))
    if transformers or (transformers is None and _transformers_can(folder, release)):
        findings.append(_in_transformers(folder, release))
    return findings


def _check_files(folder: Path) -> Iterator[Check]:
    """Those that are listed have their hashes. Git, hubs and desktops add files of their own: these are said."""
    sums = read_sums(folder, [RELEASE_FILE], others=True)
    added = sorted(entry.name for entry in folder.iterdir() if entry.name not in {*sums, SUMS_FILE})
    read = next((name for name in added if _READ.fullmatch(name)), None)
    if read is not None:
        raise CheckpointError(
            f"{folder / read} is not listed in {SUMS_FILE}, and whoever opens the folder would read it"
        )
    lines = []
    for name, found in changed(folder, sums):
        if not _differs_in_line_ends(folder / name, sums[name]):
            detail = f"{folder / name} is damaged: sha256 {found[:12]}..., expected {sums[name][:12]}..."
            raise CheckpointError(what_it_is(folder / name, detail))
        lines.append(name)
    yield Check("files", f"{len(sums)} hashed again")
    if lines:
        yield Check("line ends", f"git has written them otherwise (CRLF) in {', '.join(lines)}; the text is the same")
    if added:
        more = f" and {len(added) - _MANY} more" if len(added) > _MANY else ""
        yield Check("not listed", f"{', '.join(added[:_MANY])}{more}: not of the release, and not looked at")


def _differs_in_line_ends(path: Path, expected: str) -> bool:
    if path.stat().st_size > _TEXT_BYTES:
        return False
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest() == expected


def _check_tokenizer(folder: Path, release: Release, tokenizer: Tokenizer | None) -> Check:
    text = release.probe.text
    if text is None or tokenizer is None:
        if text is not None:
            raise CheckpointError(f"{folder} was released with a tokenizer, and there is none now")
        return Check("tokenizer", "none, as released")
    ids = [tokenizer.end_id, *tokenizer.encode(text).tolist()][: len(release.probe.ids[0])]
    if ids != release.probe.ids[0]:
        raise CheckpointError(f"{folder}: its tokenizer gives other ids than it was released with; it is another one")
    return Check("tokenizer", f"{len(ids)} ids of the probe's text")


def _compare(what: str, found: Probe, expected: Probe, allowed: float, where: str) -> Check:
    difference = found.difference(expected)
    if not difference <= allowed:
        raise CheckpointError(
            f"{what}: they differ from those {where} by {difference:.3g} nats, {allowed:.2g} is allowed"
        )
    mine, others = (list(chain.from_iterable(probe.greedy)) for probe in (found, expected))
    same = sum(a == b for a, b in zip(mine, others, strict=True))
    return Check(what, f"{where}, within {difference:.2g} nats; {same} of {len(others)} likeliest ids equal")


def _against(source: Path, release: Release) -> Check:
    model = open_model(source)
    if release.model.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"{source} has a vocabulary of {model.config.vocab_size}, the release of {release.model.vocab_size}: "
            "it was made from another model"
        )
    wanted = getattr(torch, release.dtype)
    rounded = replace(model, tensors=CastTensors(model.tensors, wanted))
    found = answered(rounded, release.probe.ids, release.probe.text)
    apart = release.difference if release.but_for_rounding is None else release.but_for_rounding
    if model.dtypes == {wanted}:
        return _compare("source", found, release.probe, apart + TOLERANCE, f"that {source.name} has")
    # Whether it is the same model shows where both are rounded; what rounding did to it is said, and not allowed for.
    same = _compare("source", found, release.probe, apart + TOLERANCE, f"that {source.name} has in {release.dtype}")
    trained = answered(model, release.probe.ids, release.probe.text)
    detail = _compare("", trained, release.probe, math.inf, "as it is stored").detail
    return Check(same.what, f"{same.detail}; {detail}")


def _recorded(release: Release) -> str:
    """Where the probe is, and how far the export found it from what was trained."""
    if release.but_for_rounding is None:
        return f"as {RELEASE_FILE} has them"
    return f"as {RELEASE_FILE} has them ({release.difference:.2g} nats from the source's when it was exported)"


# ---- transformers


def _transformers_can(folder: Path, release: Release) -> bool:
    import importlib.util

    from zili.chips.host_memory import available_bytes

    if importlib.util.find_spec("transformers") is None or not (folder / "config.json").is_file():
        return False
    room = available_bytes()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    fp32 = size * (4 // max(1, getattr(torch, release.dtype).itemsize))
    return is_our_code(folder) and (room is None or fp32 < room / 2)


def _in_transformers(folder: Path, release: Release) -> Check:
    if not is_our_code(folder):
        raise CheckpointError(f"{folder} brings Python code that is not Zili's; it is not run")
    import transformers

    with _quiet():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=any(folder.glob("*.py")), local_files_only=True
            )
        except Exception as error:  # it raises errors of several libraries, and what a model's own class does
            raise CheckpointError(f"transformers {transformers.__version__} cannot load {folder}: {error}") from error
    rows = release.probe.ids
    with torch.no_grad():
        said = [model(torch.tensor([row])).logits[0].float().log_softmax(-1) for row in rows]
    found = probe_of(rows, said, release.probe.text)
    return _compare(f"transformers {transformers.__version__}", found, release.probe, TOLERANCE, "recorded")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
