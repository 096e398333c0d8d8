import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speeder_engine.data.dataset import build_dataset
from speeder_engine.data.ids import IdColumn
from speeder_engine.data.interactions import Interactions
from speeder_engine.data.items import Items


def _write(path, columns):
    """Columns of Python values to the format the path's name says."""
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
        return path
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(record) + "\n" for record in records)
        elif kind in ("inter", "item"):
            rows = [columns, *zip(*columns.values(), strict=True)]
            file.writelines("\t".join(map(str, row)) + "\n" for row in rows)
        else:
            writer = csv.writer(file)
            writer.writerows([columns, *zip(*columns.values(), strict=True)])
    return path


@pytest.fixture(scope="session")
def write():
    return _write


@pytest.fixture(scope="session")
def id_column():
    def make(ids):
        names = list(dict.fromkeys(ids))
        return IdColumn(tuple(names), np.array([names.index(each) for each in ids], np.int32))

    return make


@pytest.fixture(scope="session")
def build(id_column):
    """A dataset from (user, item, time) rows; the catalogue has the items in sorted order."""

    def make(rows, min_interactions=0, item_ids=None, **options):
        users, items, times = zip(*rows, strict=True)
        item_ids = tuple(sorted(set(items)) if item_ids is None else item_ids)
        times = None if times[0] is None else np.array(times, np.int64)
        interactions = Interactions(id_column(users), id_column(items), times)
        catalogue = Items(item_ids, item_ids, item_ids)
        return build_dataset("made", interactions, catalogue, min_interactions, **options)

    return make


@pytest.fixture(scope="session")
def random_rows():
    """Rows of 60 users with 3 to 25 of 80 items each, in random order of the file."""
    rng = np.random.default_rng(1)
    rows = [
        (f"u{user}", f"{item:04d}", int(rng.integers(10**9)))
        for user in range(60)
        for item in rng.choice(80, rng.integers(3, 26), replace=False)
    ]
    return [rows[index] for index in rng.permutation(len(rows))]
