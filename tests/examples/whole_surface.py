"""What a user may write with the whole of `import zili`: mypy --strict reads it, nobody runs it."""

from collections.abc import Iterator
from pathlib import Path

from fastapi import FastAPI

import zili


class Quiet(zili.Callback):
    def on_step(self, trainer: zili.Trainer, record: zili.StepRecord) -> None:
        trainer.note(f"{record.loss:.3f}")
        trainer.stop("enough")


class Wide(zili.Decoder):
    pass


class Own(zili.Objective):
    def terms(self, outputs: zili.Outputs, batch: zili.Batch, peers: zili.Peers) -> zili.Terms:
        counted = (batch.labels != zili.IGNORE_INDEX).sum()
        return zili.Terms(outputs.cross_entropy(batch.labels), {}, counted)


def training(config: zili.RunConfig) -> zili.Trainer:
    data: zili.Prepared = zili.prepare(["text"], "data", vocab_size=1000)
    run: zili.OpenedRun = zili.setup({"data": data.table}, overrides={"training.steps": 3, "training.hours": None})
    choices: tuple[zili.Choice, ...] = run.choices
    shape: zili.ModelConfig = config.model
    print(choices[0].reason, shape.layers, zili.__version__)
    zili.train(config, objective=Own(), model=Wide, overrides=["training.steps=4"])
    return zili.train(run, callbacks=[Quiet()], progress=False)


def using(model: zili.OpenedModel) -> tuple[float, str, FastAPI]:
    score: zili.Score = zili.evaluate(model, [Path("text")], compressors=True)
    whole: str = zili.generate("runs/x", "Once", temperature=0)
    pieces: Iterator[str] = zili.generate(model, stream=True)
    app: FastAPI = zili.serve("runs/x", block=False)
    print(zili.load("runs/x").config.layers)
    return score.bits_per_byte, whole + "".join(pieces), app


def before_and_after() -> float:
    plan: zili.Plan = zili.plan("telechat2-3b", 64, "h100", failures=zili.Failures(per_day=1.0))
    found: list[zili.Rehearsal] = zili.rehearse(plan.recipe, 64, all_stages=True)
    try:
        release: zili.Release = zili.export("runs/x", Path("out"), layout="llama")
    except zili.ZiliError as error:
        raise SystemExit(error.exit_code) from error
    return plan.days + found[0].peak.bytes + release.difference
