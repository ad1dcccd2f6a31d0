"""The base of every table in a recipe."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from zili.errors import ConfigError


class Section(BaseModel):
    """An immutable table of settings that refuses keys it does not know.

    The docstring under a field is its documentation: `docs/configuration.md` is generated from it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def changed(self, **updates: Any) -> Self:
        """A copy with `updates`, which is checked as a recipe is. pydantic's `model_copy` checks nothing.

        A mapping changes keys of the table that is there: `config.changed(training={"steps": 5})`.

        Raises:
            ConfigError: a key is unknown, or a value does not fit or not go with the others.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        for name, value in updates.items():
            table = getattr(self, name, None)
            given[name] = value
            if isinstance(table, Section) and isinstance(value, Mapping):
                given[name] = table.changed(**value)
        try:
            return self.model_validate(given)
        except ValidationError as error:
            flaws = (": ".join((*map(str, one["loc"]), one["msg"])) for one in error.errors())
            raise ConfigError("; ".join(flaw.replace("Value error, ", "") for flaw in flaws)) from error
