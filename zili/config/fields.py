"""Which keys a recipe has, by their place in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from zili.config.run import RunConfig
from zili.config.section import Section


def fields_at(place: Sequence[Any]) -> Mapping[str, FieldInfo]:
    """The keys of the table at `place`, entries of lists left out of account; none where there is no such table."""
    section: type[Section] = RunConfig
    for part in place:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        found = section_in(field.annotation) if field else None
        if found is None:
            return {}
        section = found
    return section.model_fields


def takes_none(place: Sequence[str]) -> str | None:
    """What `none` means at `place`: "nothing", where the key may be unset; "text", where it is one of the key's words;
    None, where it is neither."""
    field = fields_at(place[:-1]).get(place[-1])
    parts = _parts(field.annotation) if field else set()
    if NoneType in parts:
        return "nothing"
    return "text" if "none" in parts else None


def _parts(annotation: Any) -> set[Any]:
    """The members of a union, the words of a literal among them."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if isinstance(annotation, type) or get_origin(annotation) in (tuple, dict):
        return {NoneType} if annotation is NoneType else set()
    return set().union(*map(_parts, get_args(annotation))) if get_args(annotation) else set()


def section_in(annotation: Any) -> type[Section] | None:
    """The kind of table that a key of this type has, or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)
