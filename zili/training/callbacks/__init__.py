"""What happens around the steps, one concern a file."""

from zili.training.callbacks.base import Callback, StepRecord
from zili.training.callbacks.metrics import MetricsLog
from zili.training.callbacks.progress import ProgressDisplay

__all__ = ["Callback", "MetricsLog", "ProgressDisplay", "StepRecord"]
