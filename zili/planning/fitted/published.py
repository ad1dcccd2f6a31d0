"""Published training runs: rows of a table with the columns of `published_runs.csv`, as runs on chips.

A row says what a paper or a repository said, so much is missing. What is filled in, and why, is listed with each
(`Row.assumed`); a row that lacks what nothing can stand in for says so (`Unpredictable`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from zili.chips.catalog import Chip, identify
from zili.config.mixture import LatentConfig, MixtureConfig
from zili.config.model import ModelConfig
from zili.errors import ChipError
from zili.models.arithmetic import count_parameters
from zili.planning.fitted.machine import Machine, machine
from zili.planning.run import Precision, Recompute, Run, Software

Cells = Mapping[str, str | None]

_LARGEST = {"layers": 10_000, "experts": 100_000}
"""Beyond these a cell is a mistake: arithmetic goes through layers one by one."""

_FUSED_ATTENTION = 2206
"""Year and month of an arXiv number: fused attention was published in May 2022 (2205.14135)."""
_TUNED = ("mlcommons", "AI-Hypercomputer", "aeeeeeep/ModelLink", "Korthikanti", "Megatron-LM SC21", "Nemotron", "PaLM")
"""Beginnings of sources in which a chip's vendor tuned the recipe, beside those that begin with the vendor's name."""
_WITHOUT_SEQUENCE_PARALLEL = ("FlagOpen/FlagPerf",)
"""Sources that report the memory of runs without tensor parallelism for runs with it."""
_LATENT = LatentConfig(query_rank=1536, key_value_rank=512, rope_head_dim=64, value_head_dim=128)
"""Of the published models with latent attention (DeepSeek-V2 section 2.1.2, V3 section 4.2)."""


class Unpredictable(Exception):
    """Nothing can be said about a row; the message says why."""


@dataclass(frozen=True)
class Row:
    """A run as published, with what had to be assumed."""

    run: Run
    chip: Chip
    machine: Machine
    seconds: float | None
    """Time of a step, as published."""
    memory_gib: float | None
    """Memory of the fullest chip, as published."""
    peak_tflops: float | None
    """The peak that the published utilisation is a share of."""
    assumed: tuple[str, ...] = ()

    @property
    def tokens_per_s_per_chip(self) -> float | None:
        """Tokens a second of one chip, from the step's seconds."""
        return self.run.tokens / self.run.chips / self.seconds if self.seconds else None


@dataclass
class _Reader:
    """Cells of a row, and what was missing."""

    cells: Cells
    assumed: list[str] = field(default_factory=list)

    def text(self, name: str) -> str:
        return (self.cells.get(name) or "").strip()

    def number(self, name: str) -> float | None:
        """A positive finite number, or nothing."""
        try:
            value = float(self.text(name))
        except ValueError:
            return None
        return value if 0 < value < float("inf") else None

    def count(self, name: str, otherwise: int | None = None, why: str = "") -> int:
        text = self.text(name)
        value = self.number(name)
        if value is not None and value == int(value):
            if value > _LARGEST.get(name, 10**9):
                raise Unpredictable(f"{name} is {text!r}, more than makes sense")
            return int(value)
        if text and not text.startswith(">") and value is None and not _says_in_words(text):
            raise Unpredictable(f"{name} is {text!r}, not a positive number")
        if value is not None:
            raise Unpredictable(f"{name} is {text!r}, not a whole number")
        if otherwise is None:
            raise Unpredictable(f"{name} is missing")
        if why:
            self.assumed.append(f"{name} {otherwise} ({why})")
        return otherwise


def _says_in_words(text: str) -> bool:
    """Whether a cell has a word where a number is wanted: "MLA", "see recipe"."""
    return re.fullmatch(r"[A-Za-z][A-Za-z ()/.:-]*", text) is not None and text.lower() not in ("nan", "inf")


def read_row(cells: Cells, chip: Chip | None = None) -> Row:
    """A row as a run; `chip` in place of the one that it names.

    Raises:
        Unpredictable: a cell is missing or makes no sense; the message has its name.
    """
    reader = _Reader(cells)
    chip = chip or _chip(reader)
    precision = _precision(reader.text("precision"))
    try:
        run = _run(reader, precision, chip)
        place = machine(chip, precision, network_gbit_s=_network(reader.text("notes")))
    except ValidationError as error:
        first = error.errors()[0]
        raise Unpredictable(f"the model cannot be: {first['msg']}") from error
    except ChipError as error:
        if chip.bf16_tflops or chip.fp16_tflops or reader.number("peak_tflops_assumed") is None:
            raise Unpredictable(str(error)) from error
        network = _network(reader.text("notes"))
        peak = reader.number("peak_tflops_assumed")
        place = machine(chip, precision, peak_tflops=peak, network_gbit_s=network)
    reader.assumed.extend(f"{name} {value:g} (usual; not published)" for name, value in place.assumed.items())
    return Row(
        run=run,
        chip=chip,
        machine=place,
        seconds=_seconds(reader, run),
        memory_gib=reader.number("memory_GB_per_chip"),
        peak_tflops=reader.number("peak_tflops_assumed"),
        assumed=tuple(reader.assumed),
    )


def _chip(reader: _Reader) -> Chip:
    name = reader.text("chip")
    if not name:
        raise Unpredictable("chip is missing")
    # "Ascend-910B (Atlas 900 A2 PODc)": the server follows in parentheses.
    found = identify(name) or identify(name.split(" (")[0])
    if found is None:
        raise Unpredictable(f"chip {name!r} is not in the catalog (`zili chips` lists it)")
    return found


def _seconds(reader: _Reader, run: Run) -> float | None:
    """Time of a step; tokens a second count where both stand, being what is measured."""
    rate = reader.number("tokens_per_s_per_chip")
    return run.tokens / run.chips / rate if rate else reader.number("step_time_s")


def _network(notes: str) -> float | None:
    """Gbit/s of a chip out of its node, from a note such as "4x100Gb RoCE" for a node of eight."""
    found = re.search(r"(\d+)x(\d+)Gb", notes)
    return int(found[1]) * int(found[2]) / 8 if found else None


def _model(reader: _Reader) -> ModelConfig:
    layers, hidden, heads = (reader.count(name) for name in ("layers", "hidden", "heads"))
    latent = _LATENT if reader.text("kv_heads") == "MLA" else None
    head_dim = 192 if latent else reader.count("head_dim", max(2, hidden // heads))
    mixture = _mixture(reader, layers, latent is not None)
    width = reader.count("ffn_hidden", 4 * hidden)
    gated = ModelConfig(
        vocab_size=reader.count("vocab", 128_000, "usual"),
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads if latent else reader.count("kv_heads", heads),
        head_dim=head_dim,
        ffn_hidden_size=width,
        latent=latent,
        mixture=mixture,
    )
    if mixture is not None:
        return gated
    # Two matrices instead of three: the same products as a gated layer of two thirds the width.
    plain = gated.changed(ffn_hidden_size=round(width * 2 / 3))
    total = reader.number("params_total_B")
    if total is None:
        return plain if width == 4 * hidden else gated
    return min((gated, plain), key=lambda model: abs(count_parameters(model).total - total * 1e9))


def _mixture(reader: _Reader, layers: int, latent: bool) -> MixtureConfig | None:
    experts = reader.count("experts", 1)
    if experts == 1:
        return None
    return MixtureConfig(
        experts=experts,
        top_k=reader.count("topk"),
        ffn_hidden_size=reader.count("expert_ffn"),
        shared_experts=int(reader.number("shared_experts") or 0),
        # Models with latent attention begin with up to three plain layers; cut-down ones have none of them.
        dense_layers=3 if latent and layers > 8 else 0,
    )


def _run(reader: _Reader, precision: Precision, chip: Chip) -> Run:
    model = _model(reader)
    tensor, pipeline, context = (reader.count(name, 1) for name in ("TP", "PP", "CP"))
    each = tensor * pipeline * context
    expert = reader.count("EP", 1)
    chips = reader.count("chips", each * reader.count("DP", max(1, expert // tensor)), "smallest of this layout")
    if chips % each:
        raise Unpredictable(f"TP {tensor} x PP {pipeline} x CP {context} does not divide {chips} chips")
    if expert > chips:
        raise Unpredictable(f"EP {expert} is more than {chips} chips")
    data = chips // each
    sequence = reader.count("seq_len", 4096, "usual")
    usual = 1 if pipeline > 1 else max(1, 2048 * tensor // sequence)
    micro = reader.count("micro_batch", usual)
    batch = reader.count("global_batch_seqs", data * micro * max(8, 4 * pipeline), "enough to fill the pipeline")
    micro = max(1, min(micro, batch // data))
    weights, states = _shards(reader, data * context)
    return Run(
        model=model,
        sequence=sequence,
        global_batch=batch,
        micro_batch=micro,
        data=data,
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        virtual=_virtual(reader, model.layers, pipeline),
        expert=expert,
        weight_shards=weights,
        state_shards=states,
        recompute=_recompute(reader.text("recompute")),
        precision=precision,
        software=_software(reader, chip),
    )


def _virtual(reader: _Reader, layers: int, pipeline: int) -> int:
    """Stages of a process. Where it is not stated, as many as leave two layers each; 1F1B has one."""
    text, notes = reader.text("VPP"), reader.text("notes")
    if pipeline == 1:
        return 1
    if text.startswith(">"):
        return 2
    if "1F1B" in notes and "Interleaved" not in notes:
        return reader.count("VPP", 1)
    usual = [count for count in range(1, layers // pipeline // 2 + 1) if layers % (pipeline * count) == 0]
    return reader.count("VPP", max(usual, default=1))


def _shards(reader: _Reader, together: int) -> tuple[int, int]:
    """Processes over which weights, and the optimizer's state, are cut."""
    stage, notes = reader.text("zero_stage"), reader.text("notes")
    if stage.startswith("0"):
        return 1, 1
    if stage.startswith("3") or (stage.startswith("FSDP") and "ZeRO-1" not in stage):
        found = re.search(r"FSDP ?(\d+)", f"{stage} {notes}")
        shards = min(together, int(found[1])) if found else together
        return shards, shards
    found = re.search(r"(\d+)-way", stage)
    return 1, min(together, int(found[1])) if found else together


def _recompute(text: str) -> Recompute:
    text = text.lower()
    if text.startswith("full") or "minimal" in text:
        return "full"
    # torchtitan's "selective (op)" repeats every other product; MaxText's save_dot_except_mlpwi those of one kind.
    return "half" if "(op)" in text or "save_dot" in text else "none"


def _precision(text: str) -> Precision:
    for name in ("fp4", "fp8", "int8"):
        if name in text.lower():
            return name
    return "bf16"


def _software(reader: _Reader, chip: Chip) -> Software:
    source, notes = reader.text("source"), reader.text("notes")
    month = re.search(r"arXiv:(\d{4})", source)
    # fp16 was given up for bf16 at about the time that fused attention came.
    early = "fp16" in reader.text("precision") or bool(month and int(month[1]) < _FUSED_ATTENTION)
    # Positions as biases (ALiBi), which fused kernels did not take.
    biased = reader.text("model").startswith("BLOOM")
    # MegaScale overlaps what tensor parallelism sends and has kernels of its own (section 3 of the paper).
    megascale = "(MegaScale)" in reader.text("model")
    # A vendor's repositories bear its name or that of its software, as `chips` has it.
    vendors = source.startswith((*_TUNED, chip.vendor)) or source.lower().startswith(f"{chip.backend}/")
    tuned = vendors or megascale
    says_so = "SP" in reader.text("recompute")
    overlap = re.search(r"mc2|async ?tp|tp/pp overlap", notes.lower()) is not None
    by_storage = reader.text("zero_stage").startswith(("3", "FSDP"))
    return Software(
        fused_attention=not early and not biased,
        sequence_parallel=(not early and not source.startswith(_WITHOUT_SEQUENCE_PARALLEL)) or says_so,
        # Plain data parallelism does, and what cuts the optimizer inside a node (InternEvo).
        sums_in_16_bits=reader.text("zero_stage").startswith("0") or "-way" in reader.text("zero_stage"),
        early="fp16" in reader.text("precision"),
        hides_gradients=not reader.text("zero_stage").startswith("0"),
        # Frameworks that cut weights for storage do, to keep no whole gradients.
        sums_each=by_storage,
        hides_tensor=overlap or (tuned and not early),
        # Those compute blocks again with torch's checkpoints or XLA; others, and all in days of fp16, whole.
        repeats_whole=not by_storage or "fp16" in reader.text("precision"),
        tuned=tuned,
    )
