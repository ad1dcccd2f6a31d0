"""On how many machines a recipe can be laid out, and how: a life may begin with fewer than the one before."""

from __future__ import annotations

from zili.config import RunConfig
from zili.errors import LayoutError
from zili.parallel.layout import Layout, lay_out


def layouts(config: RunConfig, processes: int, least: int, most: int) -> dict[int, list[str]]:
    """Numbers of machines from `least` to `most`, with `processes` on each, that `config` runs on; each with the keys
    of the recipe that change there, as `--set` takes them.

    `parallel.elastic` says which dimension may shrink. A number that does not divide the batch or the model is not
    among them: the machines above the next smaller one stand by.

    Raises:
        LayoutError: it does not even run on `most`.
    """
    whole = lay_out(config, most * processes)
    found: dict[int, list[str]] = {most: []}
    for machines in range(least, most):
        keys = _keys(config, whole, machines * processes)
        if keys is not None:
            found[machines] = keys
    return found


def _keys(config: RunConfig, whole: Layout, world: int) -> list[str] | None:
    """What changes for `world` processes; None: it cannot be laid out on them."""
    dimension = config.parallel.elastic
    if dimension == "none":
        return None
    # One replica has nothing to give up but shards, where the recipe leaves their number open.
    if whole.replicas == 1 and config.parallel.shards == "auto":
        dimension = "shards"
    rest = whole.world // getattr(whole, dimension)
    if world % rest:
        return None
    sizes = {"shards": whole.shards, dimension: world // rest}
    try:
        lay_out(config.changed(parallel=sizes), world)
    except LayoutError:
        return None
    return [f"parallel.{name}={size}" for name, size in sizes.items()]
