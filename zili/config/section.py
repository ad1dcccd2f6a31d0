"""The base of every table in a recipe."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """An immutable table of settings that refuses keys it does not know.

    The docstring under a field is its documentation: `docs/configuration.md` is generated from it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
