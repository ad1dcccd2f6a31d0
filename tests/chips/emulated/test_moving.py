"""A run moves between vendors; the whole of quickstart runs as each of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import forks
import pytest
from many import Curve, on_processes, train
from plugins import ASCEND, CAMBRICON, UNHEARD_OF, Environment, Vendor
from tiny_models import BOUND, Kind, Row, Runs, slow

from zili.ops.registry import OPERATIONS
from zili.training.checkpoints import list_checkpoints, read_state

PLAIN = tuple(f"chip.operations.{operation}=reference" for operation in OPERATIONS)
SHORT = (*PLAIN, "training.steps=6", "training.global_batch=8")
STOPS = (2, 4, 6)


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("dense", ("shards=2 tensor=2", "pipeline=2", "")),
        slow("mixture", ("shards=2 tensor=2 expert=2", "shards=2 expert=2", "")),
    ],
)
def test_ascend_to_cambricon_to_the_cpu(
    kind: Kind, layouts: tuple[str, ...], runs: Runs, with_plugins: Environment, request: pytest.FixtureRequest
) -> None:
    folder = f"folder={runs.recipe(kind).folder}"
    joined = Curve()
    for vendor, size, layout, stop in zip((ASCEND, CAMBRICON, None), (4, 2, 1), layouts, STOPS, strict=True):
        chip = "chip.name=cpu" if vendor is None else f"chip.name={vendor.backend}"
        config = runs.recipe(kind, folder, chip, *SHORT, *(f"parallel.{part}" for part in layout.split()))
        environment = None if vendor is None else with_plugins(vendor)
        part = on_processes(size, train, config, None if stop == STOPS[-1] else stop, environment=environment)[0]
        joined.losses.extend(part.losses)
        joined.norms.extend(part.norms)
        state = read_state(list_checkpoints(config.folder / "checkpoints")[-1])
        assert (state.step, state.samples) == (stop, stop * config.training.global_batch)
    assert len(joined.losses) == STOPS[-1]
    Row.of("npu x 4 → mlu x 2 → cpu", "4 → 2 → 1", kind, runs.alone(kind, *SHORT), joined, BOUND).check(request)


def test_what_a_move_cannot_take_along_is_said(runs: Runs, with_plugins: Environment) -> None:
    plain = (*PLAIN, "model.hidden_dropout=0.1")
    config = runs.recipe("dense", "chip.name=ascend", "training.steps=2", *plain)
    on_processes(1, train, config, environment=with_plugins(ASCEND))
    moved = runs.recipe("dense", f"folder={config.folder}", "training.steps=3", *plain)
    (notes,) = on_processes(1, noted, moved)
    assert any("on another kind of device: dropout draws other numbers" in note for note in notes), notes


def noted(config: object) -> list[str]:
    """What a run tells its user."""
    from many import open_trainer

    from zili.training.callbacks import Callback

    class Notes(Callback):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def on_note(self, text: str) -> None:
            self.texts.append(text)

    notes = Notes()
    open_trainer(config, [notes]).resume()  # type: ignore[arg-type]
    return notes.texts


SMALL = [
    *("model.hidden_size=32", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.head_dim=16"),
    *("model.ffn_hidden_size=48", "training.steps=4", "training.sequence_length=32", "training.global_batch=4"),
    *("schedule.warmup_steps=1", "chip.compile=false", "checkpoint.every=2"),
]
PHRASES = ["春眠不觉晓，处处闻啼鸟。", "a model learns from text.", "自立", "def read(self):\n    return 1\n"]


@pytest.mark.parametrize("vendor", [slow(ASCEND), slow(CAMBRICON), UNHEARD_OF], ids=str)
def test_quickstart_as_a_vendors_user(vendor: Vendor, with_plugins: Environment, tmp_path: Path) -> None:
    text, run = tmp_path / "text", tmp_path / "run"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text("\n".join(random.Random(i).choices(PHRASES, k=60)), encoding="utf-8")
    environment = with_plugins(vendor)

    def zili(*words: object) -> str:
        done = forks.zili(*words, environment=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    chosen = [f"chip.name={vendor.backend}", *SMALL]
    words = [word for override in chosen for word in ("--set", override)]
    out = zili("quickstart", "--text", text, "--folder", run, *words)
    assert f"chip.name = {vendor.backend}" in out and "this model" in out and "sample 1" in out
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]
    more = zili("quickstart", "--text", text, "--folder", run, "--set", "training.steps=6")
    assert "at step 4" in more
    chip = ("--chip", vendor.backend)
    drawn = ("sample", run, "--prompt", "春眠", "--max-new-tokens", "5", "--seed", "3")
    assert zili(*drawn, *chip) == zili(*drawn, "--chip", "cpu")
    score = json.loads(zili("eval", run, "--text", text / "1.txt", "--json", *chip))
    assert score["bits_per_byte"] == pytest.approx(
        json.loads(zili("eval", run, "--text", text / "1.txt", "--json", "--chip", "cpu"))["bits_per_byte"], rel=1e-5
    )
    zili("export", run, "--to", tmp_path / "published")
