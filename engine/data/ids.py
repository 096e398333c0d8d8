"""Ids: always strings, "0012349" keeps its zeros, 7 is "7", 7.0 is refused. Knows no file."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from speeder_engine.checks import is_unicode
from speeder_engine.data.tables import is_text
from speeder_engine.errors import DataError, shown


@dataclass(frozen=True, eq=False)
class IdColumn:
    """A column of ids, each distinct one stored once: row i's is `names[codes[i]]`; names in order of appearance."""

    names: tuple[str, ...]
    codes: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def ids(self) -> NDArray[np.str_]:
        return np.array(self.names, dtype=np.str_)[self.codes]

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray, where: str) -> "IdColumn":
        """From strings or whole numbers, plain or as a dictionary."""
        dtype = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (is_text(dtype) or pa.types.is_integer(dtype)):
            raise DataError(f"{where} holds {dtype}; ids must be strings or whole numbers")
        coded = column.cast(dtype).cast(pa.large_string()).dictionary_encode().combine_chunks()
        codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        names = tuple(coded.dictionary.to_pylist())
        empty = (codes < 0) | (codes == (names.index("") if "" in names else -1))
        if empty.any():
            raise DataError(f"{where} is empty in row {int(empty.argmax()) + 1}; every row needs an id")
        return cls(names, codes)


def id_text(value: object, where: str) -> str:
    """A single id as a string."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value:
        if not is_unicode(value):
            raise DataError(f"{where} is {shown(value)}, which is no valid Unicode text; mend it")
        return value
    raise DataError(f"{where} is {shown(value)}; an id is a string that is not empty, or a whole number")
