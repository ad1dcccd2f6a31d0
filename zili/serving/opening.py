"""A model opened to be served: its weights, its engine, and how it is spoken to."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zili.errors import ConfigError
from zili.serving.handover import Offer
from zili.serving.place import open_device, prepared

if TYPE_CHECKING:
    import torch

    from zili.serving.generate.engine import Engine
    from zili.serving.http.api import Served
    from zili.serving.model_folder import OpenedModel


def open_served(
    place: Path,
    offer: Offer,
    chip: str,
    keys: Path | None,
    template: str | None,
    limits: Mapping[str, Any],
    origins: Sequence[str],
    hosts: Sequence[str],
) -> Served:
    """The model in `place` on `chip`, its engine running. A line on standard error says how many answers have room.

    Raises:
        ChipError: the chip is unknown or not here.
        ConfigError: what serving takes is not installed, or there is no such dtype.
        CheckpointError: there is no model, or it is damaged.
    """
    # Before anything else loads torch; not in this thread, since choosing operations multiplies.
    device = prepared(lambda: open_device(chip))
    try:
        from zili.serving.http.api import Served
        from zili.serving.http.gate import Limits
        from zili.serving.http.keys import Keys
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'zili[serve]'") from error
    known = Keys.read(keys) if keys else Keys()
    opened, engine = prepared(lambda: _running(place, offer, device, template))
    return Served(engine, opened.tokenizer, opened.dialect, offer.name, known, Limits(**limits), origins, hosts)


def _running(place: Path, offer: Offer, device: torch.device, template: str | None) -> tuple[OpenedModel, Engine]:
    from zili.release.tensors import dtype_named
    from zili.serving.generate.engine import Engine
    from zili.serving.generate.room import room_for
    from zili.serving.model_folder import open_folder

    dtype = dtype_named(offer.dtype or "float32")
    opened = open_folder(place, device=device, dtype=dtype, template=template)
    room = room_for(opened.model.config, offer.slots, offer.context, dtype, device)
    print(room.said(offer.slots), file=sys.stderr, flush=True)  # the first line of output is the address
    vocabulary = opened.tokenizer.vocab_size
    return opened, Engine(opened.model, slots=room.slots, context=room.context, vocabulary=vocabulary)
