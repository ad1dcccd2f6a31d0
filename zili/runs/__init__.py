"""What a run goes through between its recipe and the trainer's loop, and after it: what commands and Python share."""
