"""Fit the planner's efficiencies to published runs, and say how far off it is on runs it has not seen.

    python benchmarks/planner/fit.py            # accuracy only
    python benchmarks/planner/fit.py --write    # and zili/planning/fitted/calibration.toml

Needs scipy (`pip install scipy`), and matplotlib for --plot. Error of a row: predicted over published seconds of a
step, less one. Cross-validation leaves out whole groups of rows (same chip, source and model). Efficiencies have a
usual value that they may leave where rows ask for it: few rows cannot push one far (a Gaussian prior in its logarithm,
or its log-odds where it is a share). A family's efficiencies may leave the common ones in the same way.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from zili.planning.fitted.published import Row, Unpredictable, read_row
from zili.planning.fitted.published_memory import memory_gib
from zili.planning.fitted.rates import Rates
from zili.planning.fitted.step_time import step_time

_RUNS = Path(__file__).with_name("published_runs.csv")

CALIBRATION = Path(__file__).parents[2] / "zili" / "planning" / "fitted" / "calibration.toml"
ROBUST = 0.05
"""Error from which on a row counts less than its square: what two runs of one layout, in other software, differ by."""


class Prior(NamedTuple):
    """Where an efficiency is expected, and by how much its logarithm (of a share: log-odds) may differ from there."""

    usual: float
    spread: float
    share: bool = False
    by_family: float | None = None
    """How much a family's may differ from the common one."""

    def outward(self, value: float) -> float:
        return math.log(value / (1 - value)) if self.share else math.log(value)

    def inward(self, value: float) -> float:
        return 1 / (1 + math.exp(-value)) if self.share else math.exp(value)


PRIORS = {
    "products": Prior(0.8, 0.3, by_family=0.15),
    "attention": Prior(0.5, 0.3, by_family=0.4),
    "watts_per_tflops": Prior(0.8, 0.5),
    "fp8": Prior(0.9, 0.2),
    "fp4": Prior(0.8, 0.3),
    "experts": Prior(0.85, 0.7, share=True),
    "expert_width": Prior(500, 1.5),
    "operands": Prior(1.2, 0.4),
    "memory": Prior(0.8, 0.3, share=True),
    "passes": Prior(1.2, 0.4),
    "score_passes": Prior(6, 0.3),
    "logit_passes": Prior(14, 0.3),
    "launch": Prior(5e-5, 0.7),
    "link": Prior(0.75, 0.5, share=True),
    "network": Prior(0.75, 0.7, share=True),
    "hop": Prior(1e-5, 1),
    "hide_tensor": Prior(0.5, 1, share=True),
    "hide_data": Prior(0.7, 1, share=True),
    "hide_expert": Prior(0.3, 1, share=True),
    "hide_pipeline": Prior(0.5, 1, share=True),
    "waiting": Prior(0.005, 1),
    "untuned": Prior(0.9, 0.5, share=True, by_family=0.4),
}


class Case(NamedTuple):
    """A published row to fit."""

    name: str
    group: tuple[str, str, str]
    row: Row
    mfu: float | None
    """Of the published step by one definition: what the baseline takes to be constant."""
    kind: tuple[str, ...]
    """Chip, precision, experts or none: what the baseline is constant over."""

    @property
    def seconds(self) -> float:
        assert self.row.seconds is not None
        return self.row.seconds


def main() -> None:
    arguments = _arguments()
    cases = read_cases(arguments.runs)
    families = sorted({str(case.row.chip.family) for case in cases})
    print(f"{len(cases)} rows in {len({case.group for case in cases})} groups, {len(families)} families of chips")
    fitted = Fit(families)
    found = fitted.fit(cases)
    seen = fitted.errors(found, cases)
    unseen = cross_validate(fitted, cases, found, arguments.folds)
    report(cases, seen, unseen)
    bands = bands_of(cases, unseen)
    print("bands:", ", ".join(f"{name} +-{100 * (math.exp(width) - 1):.0f} %" for name, width in bands.items()))
    rank_correlation(cases, seen, unseen)
    memory(arguments.runs)
    if arguments.write:
        CALIBRATION.write_text(as_toml(fitted, found, bands, cases, unseen), encoding="utf-8")
        print(f"written: {CALIBRATION.name}")
    if arguments.plot:
        plot(cases, unseen, arguments.plot)


def read_cases(path: Path) -> list[Case]:
    """Rows with a published time, on a chip of a family."""
    cases = []
    for cells in csv.DictReader(path.open(encoding="utf-8")):
        try:
            row = read_row(cells)
        except Unpredictable as reason:
            if cells["step_time_s"] or cells["tokens_per_s_per_chip"]:
                print(f"{cells['id']} left out: {reason}")
            continue
        if row.seconds is None or row.chip.family is None or not cells["layers"]:
            continue
        group = (cells["chip"], cells["source"], cells["model"])
        mfu = row.run.model_flops / row.run.chips / row.seconds / (row.peak_tflops or 1) / 1e12
        kind = (row.chip.name, row.run.precision, "experts" if row.run.model.mixture else "dense")
        cases.append(Case(cells["id"], group, row, mfu, kind))
    return cases


class Fit:
    """The parameters as a vector: common ones, then how far each family's are from them."""

    def __init__(self, families: Sequence[str]) -> None:
        self.families = families
        self._own = [(name, family) for name, prior in PRIORS.items() if prior.by_family for family in families]
        self.usual = np.array([prior.outward(prior.usual) for prior in PRIORS.values()] + [0.0] * len(self._own))
        spreads = [prior.spread for prior in PRIORS.values()]
        self.spreads = np.array(spreads + [PRIORS[name].by_family for name, _ in self._own])

    def rates(self, vector: np.ndarray, family: str | None) -> Rates:
        """Efficiencies of a family; None: the common ones."""
        common = dict(zip(PRIORS, vector, strict=False))
        own = {name: shift for (name, of), shift in zip(self._own, vector[len(PRIORS) :], strict=True) if of == family}
        return Rates(**{name: PRIORS[name].inward(value + own.get(name, 0.0)) for name, value in common.items()})

    def errors(self, vector: np.ndarray, cases: Sequence[Case]) -> np.ndarray:
        """Logarithm of predicted over published."""
        rates = {family: self.rates(vector, family) for family in self.families}
        return np.array([_error(case, rates[str(case.row.chip.family)]) for case in cases])

    def fit(self, cases: Sequence[Case], start: np.ndarray | None = None) -> np.ndarray:
        """The vector that explains the rows, each group counting as the root of its size."""
        sizes: dict[tuple[str, ...], int] = defaultdict(int)
        for case in cases:
            sizes[case.group] += 1
        weights = np.array([sizes[case.group] ** -0.5 for case in cases]) / ROBUST
        count = len(cases)

        def residuals(vector: np.ndarray) -> np.ndarray:
            rows = self.errors(vector, cases) * weights
            return np.concatenate([rows, (vector - self.usual) / self.spreads])

        def loss(squares: np.ndarray) -> np.ndarray:
            # Robust for rows, plain for the priors.
            rho = np.array([squares, np.ones_like(squares), np.zeros_like(squares)])
            grown = 1 + squares[:count]
            rho[:, :count] = 2 * (grown**0.5 - 1), grown**-0.5, -0.5 * grown**-1.5
            return rho

        first = self.usual if start is None else start
        return least_squares(residuals, first, loss=loss, x_scale=0.1, diff_step=1e-3, max_nfev=20).x


def _error(case: Case, rates: Rates) -> float:
    return math.log(step_time(case.row.run, case.row.machine, rates).total / case.seconds)


def cross_validate(fitted: Fit, cases: Sequence[Case], start: np.ndarray, folds: int) -> np.ndarray:
    """Errors of rows whose group the fit had not seen."""
    groups = sorted({case.group for case in cases})
    random.Random(1).shuffle(groups)
    fold = {group: index % folds for index, group in enumerate(groups)}
    errors = np.zeros(len(cases))
    for number in range(folds):
        held = [index for index, case in enumerate(cases) if fold[case.group] == number]
        vector = fitted.fit([case for case in cases if fold[case.group] != number], start)
        errors[held] = fitted.errors(vector, [cases[index] for index in held])
    return errors


def baseline(cases: Sequence[Case]) -> np.ndarray:
    """Errors of one constant utilisation for each chip, precision and kind of model, from the other groups."""
    errors = []
    for case in cases:
        others = [other for other in cases if other.group != case.group]
        alike = [other.mfu for other in others if other.kind == case.kind]
        alike = alike or [other.mfu for other in others if other.kind[0] == case.kind[0]]
        alike = alike or [other.mfu for other in others if other.kind[2] == case.kind[2]]
        errors.append(math.log(float(case.mfu or 0)) - mean(math.log(float(mfu or 0)) for mfu in alike))
    return np.array(errors)


def _relative(errors: Iterable[float]) -> list[float]:
    return [abs(math.exp(error) - 1) for error in errors]


def report(cases: Sequence[Case], seen: np.ndarray, unseen: np.ndarray) -> None:
    """Errors of all rows, and by family and kind, as a table."""
    constant = baseline(cases)
    kinds: dict[str, Callable[[Case], bool]] = {"all": lambda case: True}
    kinds["dense"] = lambda case: case.row.run.model.mixture is None
    kinds["experts"] = lambda case: case.row.run.model.mixture is not None
    for family in sorted({str(case.row.chip.family) for case in cases}):
        kinds[family] = lambda case, family=family: case.row.chip.family == family
    print("| rows | | error of unseen: median | mean | 90 % within | fitted: median | mean | constant: median | mean |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, chosen in kinds.items():
        index = [i for i, case in enumerate(cases) if chosen(case)]
        new, old, flat = (_relative(errors[index]) for errors in (unseen, seen, constant))
        numbers = [median(new), mean(new), float(np.quantile(new, 0.9)), median(old), mean(old)]
        numbers += [median(flat), mean(flat)]
        print(f"| {name} | {len(index)} | " + " | ".join(f"{100 * value:.1f} %" for value in numbers) + " |")
    worst = sorted(range(len(cases)), key=lambda i: -abs(unseen[i]))[:12]
    print("worst:", ", ".join(f"{cases[i].name} {100 * (math.exp(unseen[i]) - 1):+.0f} %" for i in worst))


def bands_of(cases: Sequence[Case], unseen: np.ndarray) -> dict[str, float]:
    """Width in logarithms that holds nine of ten unseen rows; of an unknown family, twice that of all."""
    kinds = {"dense": False, "experts": True}
    found = {}
    for name, experts in kinds.items():
        own = [
            abs(error) for case, error in zip(cases, unseen, strict=True) if bool(case.row.run.model.mixture) == experts
        ]
        found[name] = round(float(np.quantile(own, 0.9)), 3)
    found["unknown"] = round(2 * float(np.quantile(np.abs(unseen), 0.9)), 3)
    return found


def rank_correlation(cases: Sequence[Case], seen: np.ndarray, unseen: np.ndarray) -> None:
    """Spearman's, of tokens a second a chip, in sources with several layouts of one model."""
    by_source: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        by_source[case.group].append(index)
    for group, index in by_source.items():
        if len(index) < 3 or not any(name in group[1] for name in ("FlagPerf", "vTrain", "InternEvo")):
            continue
        published = [cases[i].row.tokens_per_s_per_chip or 0 for i in index]
        shown = []
        for errors in (seen, unseen):
            predicted = [speed / math.exp(errors[i]) for speed, i in zip(published, index, strict=True)]
            shown.append(f"{spearman(published, predicted):.2f}")
        print(
            f"rank correlation {group[1][:48]}, {group[2]}: {len(index)} layouts, {shown[0]} fitted, {shown[1]} unseen"
        )


def memory(path: Path) -> None:
    """Errors of memory, where a row has it; three numbers of `published_memory` were set to these."""
    errors = []
    for cells in csv.DictReader(path.open(encoding="utf-8")):
        try:
            published, row = float(cells["memory_GB_per_chip"]), read_row(cells)
        except (ValueError, Unpredictable):
            continue
        said = memory_gib(row.run, cells["memory_def"]) * (2**30 / 1e9 if cells["memory_def"].startswith("GB ") else 1)
        errors.append(abs(said / published - 1))
    print(f"memory: {len(errors)} rows, median {100 * median(errors):.1f} %, mean {100 * mean(errors):.1f} %")


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Correlation of ranks."""
    ranks = [np.argsort(np.argsort(values)) for values in (left, right)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def as_toml(fitted: Fit, vector: np.ndarray, bands: dict[str, float], cases: Sequence[Case], unseen: np.ndarray) -> str:
    """calibration.toml."""
    errors = _relative(unseen)
    lines = [
        "# Written by benchmarks/planner/fit.py; zili/planning/fitted/rates.py says what each number means.",
        f"# {len(cases)} published rows; on groups of rows it had not seen: median error {100 * median(errors):.1f} %, "
        f"mean {100 * mean(errors):.1f} %.",
        "",
        "[common]",
    ]
    common = fitted.rates(vector, None)
    lines += [f"{name} = {getattr(common, name):.4g}" for name in PRIORS]
    for family in fitted.families:
        own = fitted.rates(vector, family)
        count = sum(case.row.chip.family == family for case in cases)
        lines += ["", f"[families.{family}] # {count} rows"]
        lines += [f"{name} = {getattr(own, name):.4g}" for name, prior in PRIORS.items() if prior.by_family]
    lines += [
        "",
        "# Nine of ten unseen rows were within exp(+-width) of their prediction; unknown: twice that of all.",
        "[bands]",
    ]
    lines += [f"{name} = {width:g}" for name, width in bands.items()]
    return "\n".join(lines) + "\n"


def plot(cases: Sequence[Case], unseen: np.ndarray, path: Path) -> None:
    """Predicted against published speed, by family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 6))
    for family in sorted({str(case.row.chip.family) for case in cases}):
        index = [i for i, case in enumerate(cases) if case.row.chip.family == family]
        published = [cases[i].row.tokens_per_s_per_chip or 0 for i in index]
        predicted = [speed / math.exp(unseen[i]) for speed, i in zip(published, index, strict=True)]
        axes.scatter(published, predicted, s=14, alpha=0.7, label=f"{family} ({len(index)})")
    ends = [10, 60_000]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    for factor in (0.8, 1.25):
        axes.plot(ends, [factor * end for end in ends], color="grey", linewidth=0.6, linestyle="--")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set_xlabel("published tokens/s a chip")
    axes.set_ylabel("predicted, its group left out of the fit")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", default=_RUNS, help="a table with the same columns")
    parser.add_argument("--folds", type=int, default=40)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
