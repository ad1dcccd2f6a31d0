"""A whole run, as one typed tree. Validated before torch is imported."""

from __future__ import annotations

from os.path import expandvars
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from zili.config.model import ModelConfig
from zili.config.objective import ObjectiveConfig
from zili.config.parallel import ParallelConfig
from zili.config.section import Section
from zili.config.tiers import TierConfig
from zili.config.watch import WatchConfig

Precision = Literal["fp32", "bf16"]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class ChipConfig(Section):
    """What the run computes on, and how."""

    name: str = "auto"
    """Backend name as `zili chips` lists it; auto takes the first that is here."""
    model: str | None = None
    """Model of the chips that layout and micro-batch are made for, as `zili chips` lists them: `zili plan` and
    `zili rehearse` take it where --chip names no other."""
    precision: Precision | Literal["auto"] = "auto"
    """Dtype of the matrix products; weights, optimizer state and reductions stay fp32. Auto: the run's own, where it
    has a checkpoint; else bf16 where the chip has units for it, which on a CPU are compared with fp32 first."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile each decoder block. Auto: the run's own, where it has a checkpoint; else where the backend supports
    it and the steps will save more time than compiling takes."""
    operations: dict[str, str] = Field(default_factory=dict)
    """Version of single operations by name, e.g. `linear = "reference"`; those not named are chosen at start."""
    capabilities: dict[str, bool] = Field(default_factory=dict)
    """What you know better of this chip than its record (`zili chips NAME`), e.g. `fsdp2 = false`: what then falls back
    is printed at start. `zili doctor` finds out."""
    deterministic: bool = False
    """Steps repeat bit by bit in the same layout: operations that do not run in a slower form, or are refused. So is a
    chip that cannot."""
    threads: NonNegativeInt = 0
    """CPU threads for one operation; 0 leaves torch's own number."""


class DataSource(Section):
    """One token store and its share of the mixture."""

    store: Path
    """Path of the store without its ending: `corpus` stands for corpus.bin, corpus.idx and its manifest."""
    weight: PositiveFloat = 1.0
    """Share of the samples drawn from it, relative to the other sources."""


class DataConfig(Section):
    """What the run reads."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    tokenizer: Path
    """Folder that holds tokenizer.json; every store must have been built with it."""
    held_out: Path | None = None
    """Token store of held-out documents, for bits per byte during training."""
    verify: bool = True
    """Hash every token store at start, so that a changed or damaged one is refused. It reads them whole: for stores of
    terabytes, check once and set false."""
    prefetch: PositiveInt = 4
    """Batches read ahead of the step."""


class OptimizerConfig(Section):
    """How weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: torch's Muon on the matrices inside the blocks, multi-token prediction's too, AdamW on embeddings, head,
    routers, norms and biases."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate. Muon's update is scaled to AdamW's size, so one number serves both."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled; on matrices only, never on norms and biases."""
    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    """Muon's momentum (Nesterov)."""
    clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 does not clip."""


class ScheduleConfig(Section):
    """How the learning rate moves, as a share of its peak."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """wsd: warmup, stable, decay (linear to `final`)."""
    warmup_steps: NonNegativeInt = 0
    decay_fraction: float = Field(0.2, gt=0.0, le=1.0)
    """wsd only: last share of the steps over which the rate decays."""
    decay_start: PositiveInt | None = None
    """wsd only: steps done when the decay begins, in place of `decay_fraction`; a quickstart finds it as it runs."""
    final: float = Field(0.1, ge=0.0, le=1.0)
    """Share of the peak rate at the last step."""


class TrainingConfig(Section):
    """How long, how wide, and how it fits."""

    steps: PositiveInt
    hours: NonNegativeFloat = 0.0
    """Hours that one start of the run has, as a cluster's time limit: before they are over it writes a checkpoint and
    ends with exit code 130, and the same command goes on. What the next step and the checkpoint will take is expected
    of those before. 0: no limit."""
    start_from: Path | None = None
    """Model folder whose weights a new run begins with: Hugging Face's, Zili's, or another run. Each process reads the
    parts it holds. None: the model that `[model] folder` names; without one, weights are drawn from the seed."""
    sequence_length: PositiveInt = 512
    """Tokens a sample."""
    global_batch: PositiveInt = 8
    """Samples a step, over the whole world."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Samples a forward of one process, which takes its share of global_batch by so many. Auto: the most that fit."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: full keeps only the input of each block and computes the rest again; selective keeps
    matrix products, attention and what came from other processes."""


class PreferenceConfig(Section):
    """Learning which of two answers is better, by direct preference optimisation (Rafailov et al. 2023).

    The reference is the model that the run starts from; what it gives each answer is computed once, at the start.
    """

    beta: PositiveFloat = 0.1
    """How dear it is to leave the reference: the larger, the closer the model stays."""
    likelihood: NonNegativeFloat = 0.0
    """Weight of the loss of the chosen answers themselves, nats a token (Pang et al. 2024; Llama 3 took 0.2): keeps
    them likely, where preference alone may make both answers unlikely and a third one likely."""


class CheckpointConfig(Section):
    """What is kept."""

    every: NonNegativeInt = 200
    """Steps between checkpoints; 0 saves only at the end and when interrupted."""
    memory: NonNegativeInt = 1
    """Under `zili launch`, steps between two copies of each process's state into memory that outlives it, from which
    the next life goes on; more where copies would cost more than `memory_share`, or the last one is still on its way
    to another machine. 0: none."""
    memory_share: float = Field(0.02, gt=0.0, le=1.0)
    """Largest share of the time that such copies may take."""
    minutes: NonNegativeFloat = 0.0
    """Minutes after which another checkpoint is written, counted from the one before, beside those of `every`. 0: by
    steps alone. At which step a checkpoint is written changes no step."""
    asynchronous: bool = True
    """Write in the background: a step waits only until its tensors are copied."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints kept. At least two, so that a damaged one has one before it."""
    keep_every: NonNegativeInt = 0
    """Steps between milestones: checkpoints that stay beside the newest `keep`. Each is written, whatever `every` says.
    0: none."""
    patience: PositiveInt = 3
    """Saves in a row that may fail, a full disk say: after so many intervals without a checkpoint the run ends. Each
    that fails before is noted, and the next one tries again. With tiers: in the run's folder and in every store."""
    tiers: tuple[TierConfig, ...] = ()
    """Further places that checkpoints go to, in the background: `[[checkpoint.tiers]]`. A run goes on from the newest
    sound checkpoint of all, from the nearest place that has it."""

    @property
    def copies(self) -> int:
        """How often a run's state may lie on the host for saves in the background: once for the run's folder, whose
        save before is waited for, and once for each tier, which may still have an older one at hand."""
        return 1 + len(self.tiers) if self.asynchronous else 0

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        places = [tier.place.rstrip("/") for tier in self.tiers]
        twice = [place for number, place in enumerate(places) if place in places[:number]]
        if twice:
            raise ValueError(f"tiers: {twice[0]} is listed twice")
        return self


class EvaluationConfig(Section):
    """Held-out bits per byte while training."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates only at the end, and only where data.held_out is given."""
    max_bytes: PositiveInt = 100_000
    """UTF-8 bytes of held-out text scored each time during training; the same documents every time."""


class LoggingConfig(Section):
    """What is written beside the checkpoints."""

    every: PositiveInt = 1
    """Steps between records in metrics.jsonl."""
    line_seconds: NonNegativeFloat = 30.0
    """Seconds between lines of progress where output is no terminal (a file, a cluster's log), which has a bar instead.
    The first and the last record have a line always; 0: every record."""
    tensorboard: bool = False
    """Also write TensorBoard event files to `tensorboard/` in the run folder."""


class RunConfig(Section):
    """Everything a run is determined by."""

    name: str = Field("run", pattern=r"^[\w.-]+$")
    folder: Path = Path("runs/run")
    """Where checkpoints, metrics and the resolved recipe go."""
    seed: NonNegativeInt = 0
    """Determines initial weights, data order and dropout."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    preference: PreferenceConfig | None = None
    """`[preference]` for stores of pairs (`zili dialogues`); None: every learned token is a target."""
    objective: ObjectiveConfig = ObjectiveConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    chip: ChipConfig = ChipConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    callbacks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further callbacks by name, each a table of its own settings, such as `[callbacks.wandb]`: docs/training.md."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        training, micro = self.training, self.training.micro_batch
        if micro != "auto" and training.global_batch % micro:
            raise ValueError(
                f"training.global_batch ({training.global_batch}) is not a multiple of training.micro_batch ({micro})"
            )
        if self.schedule.warmup_steps >= training.steps and self.schedule.warmup_steps > 0:
            raise ValueError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) leaves none of training.steps "
                f"({training.steps}); for a short trial set schedule.warmup_steps = 0 beside it"
            )
        if self.schedule.decay_start is not None and self.schedule.kind != "wsd":
            raise ValueError(f"schedule.decay_start is of wsd, and schedule.kind is {self.schedule.kind}")
        if training.sequence_length > self.model.max_length:
            raise ValueError(
                f"training.sequence_length ({training.sequence_length}) is longer than model.max_length "
                f"({self.model.max_length})"
            )
        self._check_objective()
        self._check_tiers()
        self._check_watch()
        if self.preference is not None and training.start_from is None:
            raise ValueError(
                "preference: what is preferred is said of a model: name it, training.start_from or model.folder"
            )
        return self

    def _check_tiers(self) -> None:
        own = self.folder.resolve()
        for tier in self.checkpoint.tiers:
            scheme, _, rest = tier.place.rpartition("://")
            if scheme not in ("", "file", "local"):
                continue
            place = Path(expandvars(rest)).expanduser().resolve()
            if own in (place, *place.parents):
                raise ValueError(f"checkpoint.tiers: {tier.place} is in the run's own folder, which is no other place")

    def _check_watch(self) -> None:
        watch, kept = self.watch, self.checkpoint
        if watch.spike != "ignore" and watch.fewest >= self.training.steps:
            raise ValueError(
                f"watch.fewest ({watch.fewest}) good steps come before the first spike, and training.steps is "
                f"{self.training.steps}: nothing would be watched"
            )
        if watch.rolls_back and not (kept.every or kept.minutes or kept.keep_every):
            raise ValueError(
                "watch: roll_back goes back to a checkpoint, and none is written before the end; set checkpoint.every"
            )

    def of_teacher(self, teacher: ModelConfig) -> RunConfig:
        """A run of a teacher alone, laid out as this one is. It only answers: nothing is balanced or recomputed."""
        model = teacher.changed(mtp_layers=0, lora=None)
        if model.mixture is not None:
            model = model.changed(mixture={"balance_loss": 0.0})
        return self.changed(
            model=model,
            training={"recompute": "none"},
            parallel={"stage_layers": None},
            objective={"distill": None},
        )

    def _check_objective(self) -> None:
        distill = self.objective.distill
        if self.preference is not None and (distill is not None or self.objective.brought):
            raise ValueError("objective and preference are given; a run learns one of them")
        if distill is None:
            return
        own, place = self.folder.resolve(), distill.teacher.resolve()
        if place == own or own / "checkpoints" in (place, *place.parents):
            raise ValueError(
                f"objective.distill.teacher ({distill.teacher}) is what this run writes: its teacher would change at "
                "every start; name another folder, such as one that `zili export` makes of it"
            )
        teacher = distill.model
        if teacher is not None and teacher.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"objective.distill: the teacher has {teacher.vocab_size} tokens, the model {self.model.vocab_size}; "
                "both must have one tokenizer's"
            )
        if teacher is not None and teacher.max_length < self.training.sequence_length:
            raise ValueError(
                f"training.sequence_length ({self.training.sequence_length}) is longer than the teacher's max_length "
                f"({teacher.max_length})"
            )
