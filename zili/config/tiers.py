"""Places beside the run's folder that its checkpoints go to."""

from __future__ import annotations

from pydantic import NonNegativeInt, field_validator

from zili.config.section import Section

_GONE_WITH_THE_PROCESS = ("memory", "data")


class TierConfig(Section):
    """One such place."""

    place: str
    """A folder on the local disk of each machine (`/scratch/mine`; `$NAME` and `~` are what they are on each), or the
    URL of an object store that fsspec knows (`s3://bucket/prefix`; extra `store`). Credentials belong into the
    environment or the files of the store's client."""
    every: NonNegativeInt
    """Steps between checkpoints there; 0: only at the end and when interrupted."""
    keep: int = 2
    """Newest checkpoints kept there. At least two, so that a damaged one has one before it."""

    @property
    def is_store(self) -> bool:
        """Whether it is an object store, not a local disk."""
        return "://" in self.place

    @field_validator("place")
    @classmethod
    def _known(cls, place: str) -> str:
        if "://" not in place:
            if not place.startswith(("/", "~", "$")):
                raise ValueError(f"{place!r} is neither a folder from the root (/scratch/mine) nor a URL (s3://bucket)")
            return place
        # Never with the URL itself: a message ends up in logs.
        scheme, _, rest = place.partition("://")
        host = rest.partition("/")[0]
        if "?" in rest or ":" in host.rpartition("@")[0]:
            raise ValueError(
                "its URL holds credentials or a query, which would be in logs, recipes and checkpoints; give them in "
                "the environment (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or in the client's own files"
            )
        _refuse_unknown(scheme)
        if not rest.strip("/"):
            raise ValueError(f"{place} names no bucket or folder")
        return place

    @field_validator("keep")
    @classmethod
    def _safe(cls, keep: int) -> int:
        if keep < 2:
            raise ValueError(f"must be 2 or more, not {keep}: a damaged checkpoint needs one before it")
        return keep


def _refuse_unknown(scheme: str) -> None:
    import fsspec  # a fifth of a second, for those who name a store

    if "::" in scheme or scheme in _GONE_WITH_THE_PROCESS:
        raise ValueError(f"{scheme}:// keeps nothing by itself; name the store")
    known = sorted(fsspec.available_protocols())
    if scheme not in known:
        raise ValueError(f"fsspec knows no {scheme}://; it knows {', '.join(known)}")
