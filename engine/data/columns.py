"""Which column of a file means what, the same for every format. Knows no file."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from speeder_engine.errors import ConfigError, DataError, name_some

Names = str | tuple[str, ...]
Role = Literal["user", "item", "time", "title", "text", "image", "vector"]
ROLES: tuple[Role, ...] = ("user", "item", "time", "title", "text", "image", "vector")


@dataclass(frozen=True)
class Columns:
    """A column's name, or several to try in order; `text` instead names every column an item's text is made of.

    A name you give must be in the file. Of the default names, those of user and item must; without a time the order
    of the file counts. `time_unit` is the unit of plain numbers ("s" or "ms", since 1970); None means seconds, but
    milliseconds in the Amazon Reviews 2023 format, which is known by its item column `parent_asin`.
    """

    user: Names = ("user_id", "userId")
    item: Names = ("item_id", "itemId", "movieId", "parent_asin")
    time: Names = ("timestamp",)
    title: Names = ("title", "movie_title", "name")
    text: Names = ("year", "release_year", "genres", "genre", "categories", "overview", "description", "features")
    image: Names = ("image",)
    vector: Names = ("vector", "embedding")
    time_unit: Literal["s", "ms"] | None = None

    @classmethod
    def parse(cls, settings: Sequence[str]) -> "Columns":
        """`["user=uid", "item=sku,id", "time_unit=ms"]`: ROLE=NAME, or names to try in order, separated by commas."""
        given: dict[str, Any] = {}
        for setting in settings:
            role, _, names = setting.partition("=")
            if role not in (*ROLES, "time_unit") or not names:
                known = ", ".join((*ROLES, "time_unit"))
                raise ConfigError(f"column {setting!r}: write ROLE=NAME; the roles are {known}")
            given[role] = names if role == "time_unit" or "," not in names else tuple(names.split(","))
        return cls(**given)

    def __post_init__(self) -> None:
        for role in ROLES:
            value: Names = getattr(self, role)
            names = self.names(role) if isinstance(value, str | tuple) else (None,)
            if not all(isinstance(name, str) and name for name in names) or (not names and role != "text"):
                raise ConfigError(f"Columns({role}={getattr(self, role)!r}): give a column name or a tuple of names")
        if self.time_unit not in (None, "s", "ms"):
            raise ConfigError(f"Columns(time_unit={self.time_unit!r}): the units are 's' and 'ms'")

    def names(self, role: Role) -> tuple[str, ...]:
        value: Names = getattr(self, role)
        return (value,) if isinstance(value, str) else tuple(value)

    def is_default(self, role: Role) -> bool:
        default: Names = getattr(Columns, role)
        return self.names(role) == ((default,) if isinstance(default, str) else default)

    def find(self, role: Role, found: Collection[str], path: Path) -> str:
        """The first of the role's names that is in `found`; a DataError that lists what was found otherwise."""
        name = next((name for name in self.names(role) if name in found), None)
        if name is None:
            raise self._missing(role, found, path)
        return name

    def find_optional(self, role: Role, found: Collection[str], path: Path) -> str | None:
        """Like `find`, but None where only the default names were looked for."""
        if self.is_default(role) and not set(self.names(role)) & set(found):
            return None
        return self.find(role, found, path)

    def find_texts(self, found: Collection[str], path: Path) -> tuple[str, ...]:
        """The text columns in the order they are joined in."""
        absent = [name for name in self.names("text") if name not in found]
        if absent and not self.is_default("text"):
            raise DataError(f"{path}: no column {name_some(absent)}; it has {name_some(found, 20)}")
        return tuple(name for name in self.names("text") if name in found)

    def _missing(self, role: Role, found: Collection[str], path: Path) -> DataError:
        wanted = " or ".join(repr(name) for name in self.names(role))
        remedy = f"name the right one: --column {role}=NAME, in Python Columns({role}=NAME)"
        return DataError(f"{path}: no column {wanted}; it has {name_some(found, 20)}; {remedy}")
