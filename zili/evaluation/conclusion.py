"""Concludes a run: compressors on the same text, samples, a summary and the report."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zili.chips.device import Device
from zili.config import Choice, RunConfig
from zili.data.store import TokenStore
from zili.data.tokenizer import Tokenizer
from zili.durable import write_whole
from zili.errors import DataError
from zili.evaluation.bits_per_byte import stored_documents
from zili.evaluation.compressors import TRAINING_BYTES, CompressorFigure, compressor_figures
from zili.evaluation.report import write_report
from zili.evaluation.run_record import Record, read_run
from zili.models.arithmetic import count_parameters
from zili.serving.generate.continuation import Sample, sample_text
from zili.serving.generate.generation import Sampling
from zili.serving.model_folder import open_folder

_PROMPT_CHARACTERS = 60
_SAMPLES = 3
_SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Conclusion:
    """What there is to show at the end of a run."""

    evaluation: Record
    """The last `eval` record of metrics.jsonl."""
    compressors: list[CompressorFigure]
    samples: list[Sample]
    report: Path


def compress(config: RunConfig, tokenizer: Tokenizer) -> list[CompressorFigure]:
    """What compressors need for the documents that the model is scored on, whole; for the fairer of their figures they
    get the beginning of its training text.

    Raises:
        DataError: the recipe names no held-out text.
    """
    learned = itertools.chain.from_iterable(
        _texts(source.store, tokenizer, TRAINING_BYTES) for source in config.data.sources
    )
    return compressor_figures(_scored(config, tokenizer), training_texts=learned)


def conclude(
    config: RunConfig,
    tokenizer: Tokenizer,
    device: Device,
    choices: Sequence[Choice],
    compressors: list[CompressorFigure],
    seconds: float,
) -> Conclusion:
    """Write `samples.jsonl`, `summary.json` and `report.html` into the folder of a run that was evaluated.

    The samples come from the saved checkpoint: what the user's next command loads.

    Raises:
        DataError: the recipe names no held-out text, or no evaluation was recorded.
    """
    evaluations = read_run(config.folder).evals
    if not evaluations:
        raise DataError(f"{config.folder} records no evaluation; `zili train` its recipe to the end first")
    samples = _draw_samples(config, device, list(_scored(config, tokenizer)))
    lines = [json.dumps({"step": evaluations[-1]["step"], **s.as_json()}, ensure_ascii=False) for s in samples]
    write_whole(config.folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
    summary = {
        "model": {"parameters": count_parameters(config.model).total},
        "data": _data_facts(config),
        "timing": {"seconds": seconds},
        "machine": {"name": device.name(), "cores": os.cpu_count()},
        "compressors": [figure.as_json() for figure in compressors],
        "choices": [choice._asdict() for choice in choices],
    }
    write_whole(config.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return Conclusion(evaluations[-1], compressors, samples, write_report(config.folder))


def _scored(config: RunConfig, tokenizer: Tokenizer) -> Iterator[str]:
    if config.data.held_out is None:
        raise DataError("the recipe names no data.held_out, so there is nothing to compare with")
    return _texts(config.data.held_out, tokenizer, config.evaluation.max_bytes)


def _texts(prefix: Path, tokenizer: Tokenizer, max_bytes: int) -> Iterator[str]:
    """The documents of a store as text, as many as an evaluation of `max_bytes` scores."""
    for ids, _ in stored_documents(TokenStore.open(prefix), tokenizer, max_bytes):
        yield tokenizer.decode(ids)


def _data_facts(config: RunConfig) -> dict[str, int]:
    manifests = [TokenStore.open(source.store).manifest for source in config.data.sources]
    return {
        "documents": sum(manifest.documents for manifest in manifests),
        "text_bytes": sum(manifest.text_bytes for manifest in manifests),
        "tokens": sum(manifest.tokens for manifest in manifests),
    }


def _draw_samples(config: RunConfig, device: Device, texts: list[str]) -> list[Sample]:
    """Continue the beginnings of a few held-out documents."""
    opened = open_folder(config.folder, device=device.torch)
    prompts = [text[:_PROMPT_CHARACTERS] for text in texts if len(text) > 2 * _PROMPT_CHARACTERS]
    return [
        sample_text(
            opened.model,
            opened.tokenizer,
            prompt,
            max_new_tokens=_SAMPLE_TOKENS,
            sampling=Sampling(temperature=0.8, seed=seed),
        )
        for seed, prompt in enumerate(prompts[:_SAMPLES])
    ]
