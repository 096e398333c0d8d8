"""Features of new items as the graph `compress` takes them. Refused is what `Engine.upsert` refuses of vectors."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from speeder_engine.errors import DataError, shown

Features = NDArray[np.float32]
LARGEST = 1e17  # the graph squares and sums them in float32, where larger ones overflow into wrong tokens


def read_features(features: object, widths: Mapping[str, int]) -> tuple[dict[str, Features], NDArray[np.bool_]]:
    """Every modality [n, width], zero where it is missing, and bool [n, M]: which are there. Raises DataError."""
    known = ", ".join(widths)
    if not isinstance(features, Mapping):
        raise DataError(f"compress: expected arrays by modality ({known}), got {shown(features)}")
    if not features or not set(features) <= set(widths):
        raise DataError(f"compress: got features of {shown(list(features))}; give some of {known}")
    given = {name: _read(name, values, widths[name]) for name, values in features.items()}
    count = len(next(iter(given.values())))
    for name, array in given.items():
        if len(array) != count:
            raise DataError(
                f"compress: {name} has {len(array)} rows, {next(iter(given))} {count}; give one for each item"
            )
    arrays = {name: given.get(name, np.full((count, width), np.nan, np.float32)) for name, width in widths.items()}
    present = np.stack([np.isfinite(array).all(axis=1) for array in arrays.values()], axis=1)
    return {name: np.nan_to_num(array) for name, array in arrays.items()}, present


def _read(name: str, values: object, width: int) -> Features:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged lists; the last: a tensor with a gradient
        array = np.empty(0, object)
    if array.dtype.kind not in "iuf":
        raise DataError(f"compress: {name} holds something but numbers; give an array [n, {width}]")
    if array.ndim != 2 or array.shape[1] != width:
        raise DataError(f"compress: {name} has the shape {array.shape}, expected [n, {width}]")
    # in double precision: the least integer has no absolute value of its own type
    double = array.astype(np.float64)
    usable = (np.abs(double) <= LARGEST).all(axis=1)
    strange = np.flatnonzero(~(usable | np.isnan(double).all(axis=1)))
    if len(strange):
        remedy = "make it smaller, or all NaN where the modality is missing"
        raise DataError(f"compress: {name}, row {strange[0]}: NaN, infinity or beyond {LARGEST:g}; {remedy}")
    return array.astype(np.float32)
