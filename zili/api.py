"""What Zili does, as functions: the commands call the same ones.

Where a recipe is meant, it may be a TOML file, a run's folder, a table as TOML would have it, or a `RunConfig`.
`overrides` sets keys over it, as `--set` does: `{"training.steps": 100}`; None unsets one. Where a model is meant, it
may be a run, a checkpoint of it, a model folder or a GGUF file, or an `OpenedModel`.

Nothing here imports torch before a function needs it, and the chip's environment is set first. What a user can cure is
a `ZiliError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from zili import chips as backends
from zili.config.loading import Overrides
from zili.runs.opening import OpenedRun, open_run
from zili.runs.recipes import RecipeLike, read_recipe

if TYPE_CHECKING:
    from fastapi import FastAPI

    from zili.data.reading import OnError
    from zili.data.sources import Source
    from zili.evaluation.bits_per_byte import Score
    from zili.models.decoder import Decoder
    from zili.objectives.objective import Objective
    from zili.planning.search.goodput import Failures
    from zili.planning.search.plan import Plan
    from zili.rehearsal import Rehearsal
    from zili.release.record import Release
    from zili.serving.model_folder import OpenedModel
    from zili.training.callbacks import Callback
    from zili.training.trainer import Trainer


def _silent(text: str) -> None:
    pass


def setup(recipe: RecipeLike, *, overrides: Overrides = ()) -> OpenedRun:
    """Open a run without starting it: its chip is activated, automatic choices are made, its data is checked.

    Args:
        recipe: see `zili.api`.
        overrides: see `zili.api`.
    Returns:
        What `train` takes in place of a recipe. `choices` has each automatic choice with its reason; `trainer()` makes
        the trainer, for a loop of your own.
    Raises:
        ZiliError: the run is impossible here; nothing was written.
    Example:
        >>> run = zili.setup("recipe.toml", overrides={"training.steps": 10})
        >>> print(*run.choices, sep="\\n")
    """
    return open_run(read_recipe(recipe, overrides))


def train(
    recipe: RecipeLike | OpenedRun,
    *,
    callbacks: Sequence[Callback] = (),
    objective: Objective | None = None,
    model: type[Decoder] | None = None,
    progress: bool = True,
    overrides: Overrides = (),
) -> Trainer:
    """Train to the last step, from the newest checkpoint in the run's folder if there is one.

    Under torchrun each process calls it, as `zili train`.

    Args:
        recipe: see `zili.api`; or a run that `setup` has opened, whose overrides were `setup`'s.
        callbacks: further ones, after those that the recipe names.
        objective: what is learned, in place of what the recipe says: docs/objectives.md.
        model: a kind of `zili.models.decoder.Decoder`, whose shape the recipe has.
        progress: show a bar on a terminal, lines elsewhere; before it, the choices of a run that is opened here.
        overrides: see `zili.api`.
    Returns:
        The trainer after its last step: `step`, `tokens`, `model`; `interrupted` where a signal or `training.hours`
        ended it, and the same call goes on.
    Raises:
        ZiliError: it cannot be run; `TrainingError` where its loss is no longer a number.
        TypeError: a callback, an objective or a model is not of its kind.
    Example:
        >>> trainer = zili.train("recipe.toml", overrides={"training.steps": 100})
        >>> trainer.step
        100
    """
    opened = recipe if isinstance(recipe, OpenedRun) else setup(recipe, overrides=overrides)
    from zili.runs.running import run
    from zili.training.callbacks import ProgressDisplay

    if progress and opened is not recipe and opened.setup.world.is_first:
        print(*(f"  {line}" for line in (*opened.choices, *opened.loader.report)), sep="\n")
    return run(opened, [*([ProgressDisplay()] if progress else []), *callbacks], objective, model)


def evaluate(
    model: str | Path | OpenedModel,
    text: Sequence[Source],
    *,
    sequence_length: int | None = None,
    batch_size: int = 8,
    max_bytes: int | None = None,
    text_field: str = "text",
    on_error: OnError = "raise",
    compressors: bool = False,
    chip: str = "auto",
    progress: Callable[[str], None] = _silent,
) -> Score:
    """Say how many bits a model needs for a byte of text that it has not seen.

    Args:
        model: see `zili.api`.
        text: files and folders, as `prepare` takes them.
        sequence_length: tokens of a window; what the model was trained on, if not given.
        batch_size: windows at a time.
        max_bytes: stop after so many bytes of text.
        text_field: field or column of the text, in JSON lines and Parquet.
        on_error: "skip" counts what cannot be read, and goes on.
        compressors: say too what xz and zstd need for the same text.
        chip: where to run, as `zili chips` lists names.
        progress: called with what is being done.
    Returns:
        `bits_per_byte`, `loss_per_token` (nats), `compressors`, and what was counted.
    Raises:
        CheckpointError: there is no model, or it is damaged.
        DataError: the text cannot be read, or there is none.
    Example:
        >>> zili.evaluate("runs/quickstart", ["notes"]).bits_per_byte
        1.571
    """
    open_it = _opener(model, chip)
    from zili.data.reading import read_documents
    from zili.evaluation.bits_per_byte import bits_per_byte, limit_bytes
    from zili.evaluation.compressors import compressor_figures

    documents = read_documents(text, text_field=text_field, on_error=on_error)
    # Held in memory, because xz and zstd are given all of it at once anyway.
    texts = list(limit_bytes((document.text for document in documents), max_bytes))
    opened = open_it()
    score = bits_per_byte(
        opened.model,
        opened.tokenizer,
        texts,
        sequence_length=sequence_length or opened.training_length,
        batch_size=batch_size,
        progress=lambda tokens: progress(f"scoring: {tokens:,} tokens"),
    )
    if not compressors:
        return score
    progress("compressing for comparison")
    return replace(score, compressors=tuple(compressor_figures(texts)))


@overload
def generate(
    model: str | Path | OpenedModel,
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    chip: str = "auto",
    stream: Literal[False] = False,
) -> str: ...
@overload
def generate(
    model: str | Path | OpenedModel,
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    chip: str = "auto",
    stream: Literal[True],
) -> Iterator[str]: ...
def generate(
    model: str | Path | OpenedModel,
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    chip: str = "auto",
    stream: bool = False,
) -> str | Iterator[str]:
    """Continue a text.

    Args:
        model: see `zili.api`. To ask often, open it once: `zili.serving.model_folder.open_folder`.
        prompt: what to continue; empty begins a document.
        max_new_tokens: longest continuation, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: draw from the likeliest tokens of this mass; 1: all.
        top_k: draw from this many likeliest tokens; 0: all.
        repetition_penalty: above 1 avoids tokens already there.
        seed: the same seed gives the same text.
        chip: where to run, as `zili chips` lists names.
        stream: give the text piece by piece.
    Returns:
        What follows the prompt, whole or in pieces.
    Raises:
        CheckpointError: there is no model, or it is damaged.
        ConfigError: there is no such way to draw tokens.
    Example:
        >>> for piece in zili.generate("runs/quickstart", "def main", stream=True):
        ...     print(piece, end="")
    """
    opened = _opener(model, chip)()
    from zili.serving.generate.continuation import continue_text
    from zili.serving.generate.generation import Sampling

    how = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
    pieces = continue_text(opened.model, opened.tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=how)
    return pieces if stream else "".join(pieces)


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    template: str | None = None,
    keys: Path | None = None,
    slots: int = 16,
    context: int | None = None,
    dtype: str = "float32",
    queue: int = 256,
    timeout: float = 600,
    allow_origin: Sequence[str] = (),
    allow_host: Sequence[str] = (),
    chip: str = "auto",
    block: bool = True,
) -> FastAPI:
    """Answer over HTTP as OpenAI's API does.

    Args:
        model: see `zili.api`.
        host: address to listen at; "0.0.0.0" is every one of this machine.
        port: 0 takes a free one.
        name: what the model is called; its folder's name by default.
        template: chat template in place of the model's own: a name, or a file.
        keys: TOML file of keys and their limits; whoever asks needs one.
        slots: answers at once, as far as memory has room.
        context: tokens of prompt and answer; the model's by default.
        dtype: of weights and products: float32, bfloat16 or float16.
        queue: answers that may wait; further ones are refused.
        timeout: seconds an answer may take, its waiting included.
        allow_origin: web pages whose scripts may ask.
        allow_host: names by which who needs no key may ask on this machine.
        chip: where to run, as `zili chips` lists names.
        block: serve until interrupted; else your own server runs the application, and its shutdown ends the engine.
    Returns:
        The application.
    Raises:
        ChipError: the chip is unknown or not here.
        ConfigError: a package is missing (`pip install 'zili[serve]'`), or the address cannot be listened at.
        CheckpointError: there is no model, or it is damaged.
    Example:
        >>> app = zili.serve("runs/quickstart", block=False)
    """
    from zili.serving.handover import Offer, called
    from zili.serving.opening import open_served

    place = Path(model)
    limits = {"waiting": queue, "answer_seconds": timeout}
    offer = Offer(host, port, called(place, name), slots, context, dtype)
    served = open_served(place, offer, chip, keys, template, limits, allow_origin, allow_host)
    from zili.serving.http.server import listen, with_engine

    if block:
        with served.engine:
            listen(served, offer.host, offer.port, partial(print, flush=True))
    return with_engine(served)


def plan(
    model: RecipeLike,
    chips: int,
    chip: str | None = None,
    *,
    tokens: float | None = None,
    sequence_length: int | None = None,
    global_batch: int | None = None,
    layout: str | None = None,
    doctor: Mapping[str, Any] | None = None,
    peak_tflops: float | None = None,
    price: float | None = None,
    failures: Failures | None = None,
    overrides: Overrides = (),
) -> Plan:
    """Search the layouts of a model on chips that need not be here, and predict what the best takes.

    Args:
        model: a preset (`zili config presets`), or a recipe as `zili.api` says.
        chips: how many.
        chip: their model, as `zili chips` lists them; the recipe's `chip.model`, if not given.
        tokens: to train on; a recipe has its own.
        sequence_length: tokens of a sequence.
        global_batch: sequences of a step.
        layout: predict this one, as "tensor=8 pipeline=8"; "recipe" is the recipe's own.
        doctor: what `zili doctor --json` says of such a chip.
        peak_tflops: in bf16, where none is published.
        price: of a chip-hour.
        failures: how often a run is interrupted, and what that takes; by default what others have published.
        overrides: see `zili.api`.
    Returns:
        `best` and `chosen` layout, `seconds()` with their band, `days`, `cost`, and `recipe` to train by.
    Raises:
        LayoutError: nothing divides or fits.
        ChipError: the chip is not known, or its peak is not.
        ConfigError: it was not understood.
    Example:
        >>> zili.plan("telechat2-115b", 512, "ascend-910b3", tokens=1e12).days
    """
    from zili.planning.search.plan import make_plan
    from zili.runs.plans import chip_of, setting_of

    wanted = setting_of(model, chips, tokens, sequence_length, global_batch, layout, overrides)
    setting = replace(wanted, doctor=doctor, peak_tflops=peak_tflops, price=price, failures=failures or wanted.failures)
    return make_plan(setting, chip_of(chip, setting.config), chips, given=layout is not None)


def rehearse(
    recipe: RecipeLike,
    chips: int,
    *,
    rank: int = 0,
    all_stages: bool = False,
    chip: str | None = None,
    micro_batches: int | None = None,
    progress: Callable[[str], None] = _silent,
    overrides: Overrides = (),
) -> list[Rehearsal]:
    """Run one step of the real trainer as one of many processes, without them and without memory.

    Args:
        recipe: see `zili.api`.
        chips: processes in all, one a chip.
        rank: which of them to be.
        all_stages: be the first process of each place in the pipeline, each in a process of its own here.
        chip: model of the chips, as `zili chips` lists them; the recipe's `chip.model`, if not given.
        micro_batches: in the step; by default as many as memory depends on.
        progress: called with what is being done.
        overrides: see `zili.api`.
    Returns:
        What each takes: memory by part, messages, FLOPs.
    Raises:
        LayoutError: the layout does not fit the processes, the model or the batch.
        ConfigError: the micro-batch is left to the chip, and none is named or nothing fits.
    Example:
        >>> [one] = zili.rehearse("recipes/telechat2-115b-512.toml", 512)
        >>> one.peak.bytes
    """
    from zili.runs.rehearsing import rehearse_ranks

    config = read_recipe(recipe, overrides)
    return rehearse_ranks(config, chips, None if all_stages else rank, chip, micro_batches, progress)


def export(
    model: str | Path,
    to: str | Path,
    *,
    layout: str = "auto",
    dtype: str | None = None,
    shard_gb: float = 5.0,
    scores: Sequence[Path] = (),
    license_name: str = "other",
) -> Release:
    """Write a model as a release folder that transformers, vLLM or llama.cpp run, and compare it with its source.

    Args:
        model: run, checkpoint or model folder.
        to: folder to make; it appears whole.
        layout: telechat2, telechat3, llama or gguf; "auto": as it came, or the first that holds it.
        dtype: convert to float32, bfloat16 or float16; the stored one if not given.
        shard_gb: largest weight file, in GB.
        scores: results of `zili eval --out`, for the model card.
        license_name: for the model card.
    Returns:
        The release's record: `layout`, `dtype`, `notes`, and by how much log-probabilities differ from the source.
    Raises:
        CheckpointError: there is no model, `to` exists, the layout cannot hold it, or what was written does not
            compute what its source does.
        ConfigError: there is no such layout or dtype.
    Example:
        >>> zili.export("runs/quickstart", "releases/mine", layout="llama").difference
    """
    backends.apply_environment(backends.find_backend("cpu"))  # where all of it is computed, before torch is imported
    from zili.evaluation.recorded import evaluations_of
    from zili.release import export_model
    from zili.release.tensors import dtype_named

    return export_model(
        model,
        to,
        layout=layout,
        dtype=dtype_named(dtype) if dtype else None,
        max_shard_bytes=int(shard_gb * 1e9),
        evaluations=evaluations_of(Path(model), scores),
        license_name=license_name,
    )


def _opener(model: str | Path | OpenedModel, chip: str) -> Callable[[], OpenedModel]:
    """What opens `model`, on a chip that is open: before what comes next imports torch."""
    if not isinstance(model, (str, Path)):
        return lambda: model
    from zili.serving.place import open_device

    device = open_device(chip)
    from zili.serving.model_folder import open_folder

    return lambda: open_folder(Path(model), device=device)
