"""The trainer, its optimizers, schedules, checkpoints and callbacks."""
