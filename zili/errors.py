"""The errors a user can meet, each with the exit code the command line gives it.

A message says what is wrong with the numbers in it, where, and what to do next. Anything that is not a
`ZiliError` is a defect of ours and exits with 1 and a traceback.
"""


class ZiliError(Exception):
    """Base of every error a user can cause or cure."""

    exit_code = 1
    agreed = False
    """Whether every process of the run raises it, so that one of them is enough to say it."""
    alone = False
    """Whether it concerns this process and perhaps no other, so that it must say it itself."""


class ConfigError(ZiliError):
    """A recipe, an override or a command line that cannot be run as written, or not where it is to write."""

    exit_code = 3


class DataError(ZiliError):
    """Text, a tokenizer or a token store that cannot be read or does not fit the run."""

    exit_code = 4


class CheckpointError(ZiliError):
    """A checkpoint that is damaged, missing, or of another model."""

    exit_code = 5


class ChipError(ZiliError):
    """A chip that is unknown, absent, or lacks what the run asks for."""

    exit_code = 6


class TrainingError(ZiliError):
    """A run that can no longer learn: its loss or gradient is not a finite number."""

    exit_code = 8


class LayoutError(ZiliError):
    """A parallel layout that does not divide the model, the batch or the world."""

    exit_code = 7


class PeerError(ZiliError):
    """Another process of the run is gone or does not answer: what it met is the cause, and this a consequence."""

    exit_code = 11


class CorruptionError(ZiliError):
    """A chip or its memory that gave other bits than it should: what this process computes is not to be trusted."""

    exit_code = 13


class NoProgressError(ZiliError):
    """A run that fails again and again without a new step, so that a person has to look; not to be requeued."""

    exit_code = 12
