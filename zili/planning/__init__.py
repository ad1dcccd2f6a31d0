"""What a step of a model on many chips takes, by arithmetic alone: no torch, no chip, no process."""
