"""Model hubs: `hf:OWNER/NAME[@REVISION]` and `modelscope:OWNER/NAME[@REVISION]` as folders of this machine."""

from __future__ import annotations

import re
from pathlib import Path

from zili.errors import CheckpointError, ConfigError

_NAME = re.compile(r"(hf|modelscope):([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*"]
_SAFE, _PICKLED = ["*.safetensors"], ["*.bin"]
"""Weights: the second only where there are none of the first. What runs code when loaded is refused at reading."""


def is_hub_name(source: str) -> bool:
    """Whether `source` names a repository of a hub and not a place on this machine."""
    return source.startswith(("hf:", "modelscope:"))


def fetch(source: str, *, endpoint: str | None = None, cache: Path | None = None) -> Path:
    """The folder of a repository, downloaded into the hub's own cache or found there.

    Interrupted downloads go on; a repository that is whole in the cache needs no network where the hub's own variable
    says so (HF_HUB_OFFLINE=1). `endpoint`: another server than the hub's, `cache`: another folder than its cache.

    Raises:
        ConfigError: no such name, or the hub's package is not installed.
        CheckpointError: not found, not allowed, or no network.
    """
    matched = _NAME.fullmatch(source)
    if matched is None:
        raise ConfigError(
            f"{source!r} names no repository; write hf:OWNER/NAME or modelscope:OWNER/NAME, @REVISION after"
        )
    hub, repository, revision = matched.groups()
    download = _from_hugging_face if hub == "hf" else _from_modelscope
    try:
        folder = download(repository, revision, [*_SMALL, *_SAFE], endpoint, cache)
        if not any(folder.glob("*.safetensors")):
            folder = download(repository, revision, [*_SMALL, *_PICKLED], endpoint, cache)
    except (ImportError, ConfigError):
        raise
    except Exception as error:  # each hub's package has a tree of its own, and its transport's below
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{source} cannot be fetched: {reason}; check its name and the network, or give a folder"
        ) from error
    return folder


def _from_hugging_face(
    repository: str, revision: str | None, patterns: list[str], endpoint: str | None, cache: Path | None
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(repository, revision=revision, allow_patterns=patterns, endpoint=endpoint, cache_dir=cache)
    )


def _from_modelscope(
    repository: str, revision: str | None, patterns: list[str], endpoint: str | None, cache: Path | None
) -> Path:
    try:
        from modelscope_hub.compat import snapshot_download
    except ImportError as error:
        raise ConfigError("modelscope: needs the package modelscope-hub: pip install modelscope-hub") from error
    place = None if cache is None else str(cache)
    found = snapshot_download(
        repository, revision=revision, allow_patterns=patterns, endpoint=endpoint, cache_dir=place
    )
    return Path(found)
