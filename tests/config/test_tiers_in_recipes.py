"""What `[[checkpoint.tiers]]` refuses, in a line that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zili.config import RunConfig, dump_recipe, load_recipe
from zili.errors import ConfigError

Recipe = Callable[..., RunConfig]


def tiers(*places: str, keep: int = 2) -> str:
    return "checkpoint.tiers=[" + ", ".join(f'{{place="{one}", every=5, keep={keep}}}' for one in places) + "]"


@pytest.mark.parametrize(
    ("places", "keep", "said"),
    [
        (("/scratch/a", "/scratch/a/"), 2, "checkpoint: tiers: /scratch/a is listed twice"),
        (("s3://bucket/a", "s3://bucket/a"), 2, "checkpoint: tiers: s3://bucket/a is listed twice"),
        (("scratch/a",), 2, "'scratch/a' is neither a folder from the root (/scratch/mine) nor a URL (s3://bucket)"),
        (("nosuch://bucket/a",), 2, "fsspec knows no nosuch://; it knows "),
        (("memory://a",), 2, "memory:// keeps nothing by itself; name the store"),
        (("simplecache::s3://bucket/a",), 2, "simplecache::s3:// keeps nothing by itself"),
        (("s3://",), 2, "s3:// names no bucket or folder"),
        (("s3://bucket/a",), 1, "keep: must be 2 or more, not 1: a damaged checkpoint needs one before it"),
        (("s3://key:hidden@bucket/a",), 2, "its URL holds credentials or a query, which would be in logs"),
        (("s3://bucket/a?token=hidden",), 2, "its URL holds credentials or a query, which would be in logs"),
    ],
)
def test_a_tier_that_cannot_be_is_refused_in_one_line(
    recipe: Recipe, places: tuple[str, ...], keep: int, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(tiers(*places, keep=keep))
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 1 and said in lines[0], caught.value
    assert "hidden" not in str(caught.value)


def test_the_runs_own_folder_is_no_other_place(recipe: Recipe, tmp_path: Path) -> None:
    for place in (f"{tmp_path}/run", f"{tmp_path}/run/checkpoints", f"file://{tmp_path}/run/checkpoints/more"):
        with pytest.raises(ConfigError, match="is in the run's own folder, which is no other place"):
            recipe(tiers(place))
    assert len(recipe(tiers(f"{tmp_path}/scratch", f"file://{tmp_path}/bucket")).checkpoint.tiers) == 2


def test_a_recipe_with_tiers_is_read_back_equal(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(tiers("$SCRATCH/mine", "s3://bucket/a", "abfs://container@account.host/a"))
    (tmp_path / "recipe.toml").write_text(dump_recipe(config))
    assert load_recipe(tmp_path / "recipe.toml") == config
