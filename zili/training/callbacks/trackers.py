"""Runs in Weights & Biases and SwanLab, by their own clients.

What a client, its service or the disk refuses is a note, and the run goes on without it: `metrics.jsonl` has every
figure. A run that goes on from a checkpoint goes on in the same remote run. Steps that happen again after a crash are
recorded again there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from zili.durable import write_whole
from zili.errors import ConfigError
from zili.training.callbacks.base import Callback, StepRecord

if TYPE_CHECKING:
    from zili.training.trainer import Trainer


class _Tracker(Callback):
    """What the services have in common."""

    client: str
    """The name of its package, of its extra here, and of its folder in the run's."""

    def __init__(self, name: str | None, **given: Any) -> None:
        """`name`: of the run there, its own by default. `given`: to the client as it is.

        Raises: ConfigError, the client is not installed.
        """
        if find_spec(self.client) is None:
            raise ConfigError(f"callbacks.{self.client}: it is not installed: pip install 'zili[{self.client}]'")
        self._name, self._given = name, given
        self._run: Any = None
        self._note: Callable[[str], None] = print

    @abstractmethod
    def begin(self, module: Any, folder: Path, given: dict[str, Any]) -> Any:
        """The client's run, new or gone on with, whose files go into the run's `folder`."""

    @abstractmethod
    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Record what is known at a step."""

    @abstractmethod
    def finish(self, *, failed: bool) -> None:
        """Hand over what is left."""

    def on_start(self, trainer: Trainer) -> None:
        self._note = trainer.note

        def begin() -> None:
            config = trainer.config
            identity = {"id": _identity(config.folder / self.client), "resume": "allow"}
            about = {"name": self._name or config.name, "config": config.model_dump(mode="json")}
            self._run = self.begin(import_module(self.client), config.folder, {**self._given, **about, **identity})

        self._attempt(begin)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._record("train", record.step, record.figures())

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        self._record("eval", step, values)

    def on_end(self, trainer: Trainer) -> None:
        self._finish(failed=False)

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._finish(failed=True)

    def _record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if self._run is not None:
            figures = {f"{kind}/{name}": value for name, value in values.items() if name != "step"}
            self._attempt(lambda: self.record(step, figures))

    def _finish(self, *, failed: bool) -> None:
        if self._run is not None:
            self._attempt(lambda: self.finish(failed=failed))
            self._run = None

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do `work`; where it is refused, say so and leave the client alone from then on."""
        try:
            work()
        except Exception as error:  # the client's own, its service's, the disk's: none is a reason to end a run
            self._run = None
            first = str(error).strip().partition("\n")[0]
            self._note(f"{self.client} gets no more of this run ({type(error).__name__}: {first}); metrics.jsonl does")


class WandbLog(_Tracker):
    """Weights & Biases. Without a network: `mode = "offline"`, and `wandb sync` later."""

    client = "wandb"

    def __init__(
        self,
        project: str = "zili",
        entity: str | None = None,
        name: str | None = None,
        tags: tuple[str, ...] = (),
        mode: Literal["online", "offline"] | None = None,
    ) -> None:
        """`name` is the run's own by default; `mode` is what the client's environment says."""
        super().__init__(name, project=project, entity=entity, tags=tags, mode=mode)

    def begin(self, module: Any, folder: Path, given: dict[str, Any]) -> Any:
        quiet = module.Settings(console="off", silent=True)  # the terminal is the run's own
        run = module.init(dir=str(folder), settings=quiet, **given)
        # Not by the client's own count of steps, which refuses those that happen again.
        run.define_metric("*", step_metric="step")
        return run

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class SwanLabLog(_Tracker):
    """SwanLab. Without a network: `mode = "offline"`, and `swanlab sync` later, or `mode = "local"`."""

    client = "swanlab"

    def __init__(
        self,
        project: str = "zili",
        workspace: str | None = None,
        name: str | None = None,
        tags: tuple[str, ...] = (),
        mode: Literal["online", "offline", "local"] | None = None,
    ) -> None:
        """`name` is the run's own by default; `mode` is what the client's environment says."""
        super().__init__(name, project=project, workspace=workspace, tags=list(tags), mode=mode)

    def begin(self, module: Any, folder: Path, given: dict[str, Any]) -> Any:
        quiet = module.Settings(interactive=False)  # it would ask for a key, and wait
        return module.init(log_dir=str(folder / self.client), settings=quiet, **given)

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def finish(self, *, failed: bool) -> None:
        self._run.finish(state="crashed" if failed else "success")


def _identity(folder: Path) -> str:
    """The remote run's, kept in `folder` from the first start on."""
    file = folder / "id"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, uuid4().hex)
    return file.read_text(encoding="utf-8").strip()
