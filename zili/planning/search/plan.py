"""A plan: a model on chips, with its best layouts, their time with its error, memory, days, money and failures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import ceil, inf, isinf, log2
from typing import Any

from zili.chips.catalog import Chip
from zili.config import RunConfig, build_config
from zili.errors import ConfigError, LayoutError
from zili.models.arithmetic import count_parameters
from zili.planning.fitted.machine import Machine, fastest_product, machine, with_measurements
from zili.planning.fitted.rates import Band, Rates, band_of, families, rates_of
from zili.planning.search.goodput import DAY, Failures, Goodput, goodput
from zili.planning.search.hyperparameters import Filled, batch_tokens, filled, flops, left_open
from zili.planning.search.layouts import Candidate, Found, predicted, search
from zili.plurals import counted

_TOKENS_A_STEP = 16 * 1024**2
"""Most tokens of a step where no batch is given: what large published runs have."""
_IDLE, _BUSY, _OVERHEAD = 0.25, 0.9, 1.3
"""Power of an idle and of a busy chip as a share of its rating, and of a site over its chips': usual, not measured."""
_STATE_BYTES = 12
"""Size of a parameter in a checkpoint: weight and both moments in fp32."""
_LEAST_SHARE = 0.01
_PATIENCE = 10.0
"""Seconds that are spent to find out how many chips would do."""

MFU = (
    "6 N + 3 L S H (d + d_v) FLOPs a token, over the chip's bf16 peak: N parameters in matrices that a token goes "
    "through, the head included; a causal row counts half; what is computed again does not count"
)


@dataclass(frozen=True)
class Setting:
    """What the same plan on other chips shares."""

    config: RunConfig
    """Model, batch and sequence; layout and micro-batch are what is looked for."""
    tokens: float
    """To train on."""
    failures: Failures
    price: float | None = None
    """Price of a chip-hour."""
    doctor: Mapping[str, Any] | None = None
    """A report of `zili doctor --json`, measured on one of the chips."""
    peak_tflops: float | None = None
    """In bf16, where it is not published or not believed."""
    batch_taken: bool = False
    """Nobody gave a global batch: it was chosen here."""


@dataclass(frozen=True)
class Plan:
    """A model on so many chips of one kind."""

    setting: Setting
    chip: Chip
    chips: int
    machine: Machine
    rates: Rates
    found: Found
    band: Band
    goodput: Goodput
    notes: tuple[str, ...]
    """What was assumed, and why."""

    @property
    def best(self) -> Candidate:
        """The fastest layout that fits; the first of those asked for."""
        return self.found.best[0]

    @property
    def chosen(self) -> Candidate:
        """The one to run: the simplest that is as fast, as far as a prediction can tell (`search.TIE`)."""
        return self.found.simplest or self.best

    @cached_property
    def left_open(self) -> list[Filled]:
        """What the setting leaves open beside the layout, and a run needs."""
        candidate = self.chosen
        return list(left_open(candidate.config, self.setting.tokens, candidate.time.total, self.goodput.interval))

    @property
    def recipe(self) -> RunConfig:
        """The chosen layout, with nothing left open but where the data lies."""
        return filled(self.chosen.config, self.left_open)

    def seconds(self, candidate: Candidate) -> tuple[float, float, float]:
        """Time of a step: predicted, and the ends of its band."""
        total = candidate.time.total
        return total, total * self.band.low, total * self.band.high

    def tokens_per_s(self, candidate: Candidate) -> float:
        """On all chips, while they train."""
        return candidate.run.tokens / candidate.time.total

    def mfu(self, candidate: Candidate) -> float:
        """Model FLOPs utilisation, by the definition `MFU`."""
        return candidate.run.model_flops / self.chips / candidate.time.total / self.machine.peak

    @property
    def days(self) -> float:
        """To train on all tokens, interruptions included."""
        return self.setting.tokens / self.tokens_per_s(self.best) / self.goodput.share / DAY

    @property
    def chip_hours(self) -> float:
        """Hours of all chips held, spares included."""
        return self.days * 24 * (self.chips + self.goodput.spares)

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        return None if self.setting.price is None else self.chip_hours * self.setting.price

    @property
    def megawatt_hours(self) -> float | None:
        """An estimate: chips at nine tenths of their rating while they train, a quarter while not, and the site.

        Spares are idle.
        """
        if self.chip.watts is None:
            return None
        mean = _IDLE + (_BUSY - _IDLE) * self.goodput.share
        busy = self.chips * mean + self.goodput.spares * _IDLE
        return self.days * 24 * busy * self.chip.watts * _OVERHEAD / 1e6

    @property
    def interruptions(self) -> float:
        return self.goodput.interruptions(self.days * DAY)

    @property
    def checkpoint_bytes(self) -> float:
        count = count_parameters(self.setting.config.model)
        return _STATE_BYTES * (count.total + count.next_tokens)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {
            "chip": self.chip.name,
            "chips": self.chips,
            "spare_chips": self.goodput.spares,
            "tokens": self.setting.tokens,
            "mfu_definition": MFU,
            "layouts": [self._layout_json(candidate) for candidate in self.found.best],
            "chosen": self._layout_json(self.chosen),
            "left_open": [one._asdict() for one in self.left_open],
            "searched": self.found.searched,
            "others": [{"choice": one.choice, "why": one.why} for one in self.found.drawbacks],
            "days": self.days,
            "chip_hours": self.chip_hours,
            "cost": self.cost,
            "megawatt_hours_estimate": self.megawatt_hours,
            "goodput": asdict(self.goodput)
            | {"interruptions": self.interruptions, "improve_first": self.goodput.first_to_improve}
            # JSON has no infinity: of a run that nothing interrupts there is no such number.
            | ({"mean_between": None} if isinf(self.goodput.mean_between) else {}),
            "checkpoint_bytes": self.checkpoint_bytes,
            "notes": list(self.notes),
        }

    def _layout_json(self, candidate: Candidate) -> dict[str, Any]:
        seconds, low, high = self.seconds(candidate)
        parallel, training = candidate.config.parallel, candidate.config.training
        return {
            "layout": asdict(candidate.layout),
            "schedule": parallel.schedule,
            "stages_per_process": parallel.stages_each,
            "micro_batch": training.micro_batch,
            "micro_batches": candidate.run.micro_batches,
            "recompute": training.recompute,
            "step_seconds": seconds,
            "step_seconds_band": [low, high],
            "seconds_by_part": vars(candidate.time),
            "tokens_per_s": self.tokens_per_s(candidate),
            "mfu": self.mfu(candidate),
            "memory_bytes": candidate.bytes,
            "memory_bytes_by_part": candidate.memory,
        }


def make_plan(setting: Setting, chip: Chip, chips: int, *, given: bool = False) -> Plan:
    """The best layouts of a setting on `chips` of `chip`; `given`: the setting's own layout instead.

    Raises:
        ChipError: the chip's peak is not known.
        LayoutError: no layout divides the chips, or none fits; the message says what would.
    """
    place, notes = _machine(setting, chip)
    if place.capacity is None:
        notes.append(f"the memory of {chip.name} is not published: whether anything fits was not looked at")
    if setting.batch_taken:
        notes.append(_batch_note(setting))
    rates = rates_of(chip.family).on(place)
    if chip.family not in families():
        notes.append(f"no published runs on {chip.name} or its like: common efficiencies, and a wide band")
    if given:
        candidate = predicted(setting.config, chips, place, rates)
        found = Found((candidate,), (), 1, candidate)
    else:
        found = search(setting.config, chips, place, rates)
    if not found.best or (given and not found.best[0].fits):
        raise LayoutError(_does_not_fit(setting, chip, chips, place, rates, found, given))
    band = band_of(found.best[0].run, chip.family)
    good = goodput(chips, setting.failures)
    if good.share < _LEAST_SHARE:
        raise ConfigError(
            f"interrupted every {good.mean_between:.0f} s, with {setting.failures.restart:.0f} s to restart, "
            f"{counted(chips, 'chip')} hardly train at all; fewer chips, fewer failures or a faster restart"
        )
    return Plan(setting, chip, chips, place, rates, found, band, good, tuple(notes))


def _batch_note(setting: Setting) -> str:
    training = setting.config.training
    compute = flops(setting.config.model, training.sequence_length, setting.tokens)
    return (
        f"no global batch was given: {counted(training.global_batch, 'sequence')}, near the rule's "
        f"{batch_tokens(compute) / 1e6:.2g} M tokens for {compute:.2g} FLOPs (DeepSeek LLM, 2401.02954), within what "
        f"the chips can share and the {_TOKENS_A_STEP / 1e6:.0f} M tokens of large published runs; --global-batch sets "
        "another"
    )


def _machine(setting: Setting, chip: Chip) -> tuple[Machine, list[str]]:
    """The chip as published, given and measured, and what was assumed and measured of it."""
    peak, notes = setting.peak_tflops, []
    if (peak or chip.bf16_tflops or chip.fp16_tflops) is None and setting.doctor is not None:
        reached = fastest_product(setting.doctor)
        if reached is not None:
            peak = reached / 1e12
            notes.append(f"the peak of {chip.name} is not published: MFU is a share of its fastest product")
    place = machine(chip, peak_tflops=peak)
    notes += [f"{name} {value:g}: usual, {chip.name}'s is not published" for name, value in place.assumed.items()]
    if setting.doctor is not None:
        place, measured = with_measurements(place, setting.doctor)
        notes += [f"measured: {text}" for text in measured]
    return place, notes


def _does_not_fit(
    setting: Setting, chip: Chip, chips: int, place: Machine, rates: Rates, found: Found, given: bool
) -> str:
    least = found.smallest
    has = f"{chip.name} has {place.room / 2**30:.1f} GiB beside its runtime"
    if given:
        return (
            f"this layout takes {least.bytes / 2**30:.1f} GiB a chip, and {has}; leave out --layout to have one found"
        )
    more = chips
    started = time.monotonic()
    while more < 1024 * chips and time.monotonic() - started < _PATIENCE:
        more *= 2
        try:
            if search(setting.config, more, place, rates, count=1).best:
                return (
                    f"no layout fits {counted(chips, 'chip')}: the smallest found takes "
                    f"{least.bytes / 2**30:.1f} GiB, and {has}; {more:,} chips have room for it"
                )
        except LayoutError:
            continue
    takes = f"the smallest found takes {least.bytes / 2**30:.1f} GiB"
    return f"no layout fits {counted(chips, 'chip')}, nor was one found up to {more:,}: {takes}, and {has}"


def usual_batch(chips: int, sequence: int, compute: float = inf) -> int:
    """Sequences of a step that layouts on `chips` divide, every odd factor of the chips among them. They are near what
    the rule has for a run of `compute` FLOPs, at least one for eight chips, and 16 Mi tokens at most."""
    odd = chips
    while odd % 2 == 0:
        odd //= 2
    # Eight chips are a node: tensor, context and pipeline can share a sequence among so many.
    tokens = min(_TOKENS_A_STEP, max(batch_tokens(compute), chips * sequence / 8))
    return odd * 2 ** max(0, round(log2(tokens / sequence / odd)))


def setting_config(model: Mapping[str, Any], sequence: int, global_batch: int, tokens: float, name: str) -> RunConfig:
    """A recipe for a model by itself: where its data lies is for the user to say."""
    table = {
        "name": name,
        "folder": f"runs/{name}",
        "model": {**model, "max_length": max(sequence, int(model.get("max_length", sequence)))},
        "data": {"sources": [{"store": "data/corpus"}], "tokenizer": "data/tokenizer"},
        "training": {
            "steps": max(1, ceil(tokens / (global_batch * sequence))),
            "sequence_length": sequence,
            "global_batch": global_batch,
            "micro_batch": 1,
        },
        "chip": {"precision": "bf16"},
    }
    return build_config(table, origin="the plan")
