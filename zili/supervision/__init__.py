"""What watches over the processes of a run: what went wrong, who met it first, and what to do."""
