"""A model as a release: a whole folder that transformers, vLLM or llama.cpp run, with what is known of it.

Weights are written a shard at a time. Then the folder is read back and probed beside its source (`zili.release.probe`),
and what was said is kept in it, so that `zili verify` can ask again wherever the folder went.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zili.checksums import sha256, write_sums
from zili.data.chat import ChatTemplate
from zili.data.tokenizer import Tokenizer
from zili.durable import whole_folder
from zili.errors import CheckpointError, ConfigError
from zili.release.card import card
from zili.release.companions import bring, chat_template_of, complete, tokenizer_of
from zili.release.equivalent import Equivalent, llama_equivalent, telechat2_equivalent
from zili.release.folder import write_json
from zili.release.gguf.file import GGUF_FILE, write_gguf
from zili.release.gguf.tokenizer import write_tokenizer
from zili.release.layouts.layout import PublishedConfig, PublishedLayout, Variant
from zili.release.layouts.mapping import PublishedTensors
from zili.release.opening import GGUF_LAYOUT, LAYOUTS, OpenModel, open_model
from zili.release.probe import TOLERANCE, Probe, answered, make_probe
from zili.release.provenance import provenance_of
from zili.release.record import RELEASE_FILE, Evaluation, Release
from zili.release.tensors import DEFAULT_SHARD_BYTES, CastTensors, write_tensors


def export_model(
    source: str | Path,
    target: str | Path,
    *,
    layout: str = "auto",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    evaluations: Sequence[Evaluation] = (),
    license_name: str = "other",
) -> Release:
    """Write any model `load` takes as a release folder; returns its record.

    `layout` "auto" takes the layout the weights came in, else the first that can hold the model. A model exported so
    gets its original config.json back, with what has changed since put in. A layout that is named gets a model that
    computes the same, where its own words cannot say it (`zili.release.equivalent`). `evaluations` go into the card.

    Raises:
        CheckpointError: as `load`, `target` exists, the layout cannot hold the model, or what was written does not
            compute what its source does.
        ConfigError: no layout of that name.
    """
    trained = model = open_model(Path(source))
    if dtype is not None and trained.dtypes != {dtype}:
        model = replace(trained, tensors=CastTensors(trained.tensors, dtype))
    chosen, said = _said(layout, model)
    tokenizer = tokenizer_of(model.companions)
    with whole_folder(Path(target)) as aside:
        if chosen is GGUF_LAYOUT:
            _write_gguf(aside, said, tokenizer, Path(target).name, chat_template_of(model.companions))
        else:
            own_config = _write_model(aside, model, chosen, said, max_shard_bytes, keep=layout == "auto")
            bring(model.companions, aside)
            complete(aside, tokenizer, own_config=own_config)
        written = replace(open_model(aside), companions=model.companions)
        probe = make_probe(written, tokenizer)
        but_for_rounding = difference = _difference(model, probe, said)
        if model is not trained:
            difference = probe.difference(answered(trained, probe.ids, probe.text))
        release = Release(
            layout=chosen.name,
            model=said.config,
            dtype=_dtype(written),
            notes=said.notes,
            difference=difference,
            probe=probe,
            provenance=provenance_of(Path(source), model),
            evaluations=tuple(evaluations),
            but_for_rounding=but_for_rounding,
        )
        write_json(aside / RELEASE_FILE, release.as_json())
        (aside / "README.md").write_text(card(release, Path(target).name, license_name), encoding="utf-8")
        write_sums(aside, {file.name: sha256(file) for file in aside.iterdir()})
    return release


def _said(name: str, model: OpenModel) -> tuple[PublishedLayout, Equivalent]:
    """The layout and the model in its words."""
    by_name = {layout.name: layout for layout in (*LAYOUTS, GGUF_LAYOUT)}
    if name == "auto":
        chosen = _held(model)
        return chosen, Equivalent(model.config, model.tensors, (), exact=True)
    if name not in by_name:
        raise ConfigError(f"there is no layout {name!r}; choose auto, {', '.join(by_name)}")
    chosen = by_name["deepseek"] if name == "telechat3" and model.config.latent else by_name[name]
    said = Equivalent(model.config, model.tensors, (), exact=True)
    if chosen.name in ("llama", "telechat3", "gguf"):
        said = llama_equivalent(model.config, model.tensors, own_yarn=chosen.name == "telechat3")
    elif chosen.name == "telechat2":
        said = telechat2_equivalent(model.config, model.tensors)
    unsupported = chosen.unsupported(said.config)
    if unsupported:
        why = "; ".join(unsupported)
        raise CheckpointError(f"the {chosen.name} layout cannot hold this model: {why}; try --as auto")
    return chosen, said


def _held(model: OpenModel) -> PublishedLayout:
    by_name = {layout.name: layout for layout in LAYOUTS}
    first = by_name.get(model.origin.layout, LAYOUTS[0]) if model.origin else LAYOUTS[0]
    for layout in (first, *LAYOUTS):
        if not layout.unsupported(model.config):
            return layout
    reasons = "; ".join(f"{layout.name}: {layout.unsupported(model.config)[0]}" for layout in LAYOUTS)
    raise CheckpointError(f"no published layout can hold this model ({reasons})")


def _write_model(
    aside: Path, model: OpenModel, chosen: PublishedLayout, said: Equivalent, max_shard_bytes: int, *, keep: bool
) -> bool:
    """config.json and the weights; `keep` gives an original config.json that still holds back, byte for byte.

    Returns whether config.json is of our writing.
    """
    own = model.origin is not None and model.origin.layout == chosen.name
    variant = model.origin.variant if own and keep and model.origin else Variant(chosen.prefix)
    published = PublishedTensors(said.tensors, chosen.rules(said.config, variant))
    config = _published_config(model, chosen, variant, said, keep)
    stored = str(published.describe()[variant.prefix + chosen.embedding].dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    write_json(aside / "config.json", {**config, key: stored})
    write_tensors(published, aside, max_shard_bytes)
    return model.origin is None or config is not model.origin.config


def _write_gguf(
    aside: Path, said: Equivalent, tokenizer: Tokenizer | None, name: str, template: ChatTemplate | None
) -> None:
    def put_tokenizer(writer: Any) -> None:
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            write_tokenizer(writer, tokenizer, said.config.vocab_size, template)

    published = PublishedTensors(said.tensors, GGUF_LAYOUT.rules(said.config, Variant("")))
    metadata = {**GGUF_LAYOUT.write_config(said.config), "general.name": name}
    write_gguf(aside / GGUF_FILE, metadata, published, put_tokenizer)


def _published_config(
    model: OpenModel, layout: PublishedLayout, variant: Variant, said: Equivalent, keep: bool
) -> dict[str, Any]:
    """The original config.json where there is one, with the keys of what has changed since."""
    written = layout.write_config(said.config)
    if model.origin is None or model.origin.layout != layout.name:
        return written
    original = model.origin.config
    names = set(layout.published_shapes(said.config, variant))
    if keep and layout.read_config(PublishedConfig(Path("config.json"), original), names) == said.config:
        return original
    # transformers' newer spelling of what `rope_theta` and `rope_scaling` say would win over them.
    kept = {key: value for key, value in original.items() if key != "rope_parameters"}
    return {**kept, **written}


def _dtype(model: OpenModel) -> str:
    return str(model.tensors.describe()["embedding.weight"].dtype).removeprefix("torch.")


def _difference(model: OpenModel, probe: Probe, said: Equivalent) -> float:
    """Largest difference of a log-probability between what was written and its source in the same dtype, in nats.

    Raises: CheckpointError where it should not be there.
    """
    difference = probe.difference(answered(model, probe.ids, probe.text))
    if said.exact and not difference <= TOLERANCE:
        raise CheckpointError(
            f"what was written does not compute what its source does: log-probabilities differ by {difference:.3g} "
            f"nats, {TOLERANCE:g} is allowed; a defect of ours, please report it"
        )
    return difference
