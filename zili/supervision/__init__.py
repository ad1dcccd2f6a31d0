"""`zili launch`: a run whose processes are watched, and begun anew within seconds when one breaks.

An `agent` on each machine starts that machine's processes through its `nursery`, and watches them. One `root` knows all
agents; it begins the lives of the run and ends them. The `folder` is what machines find one another by. What ended a
life, and what follows, is decided by `verdicts`, from a table of `rules`. Machines come from Slurm, Kubernetes or ssh,
which start the same command on each.
"""
