import datetime
import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speeder_engine.data.columns import Columns
from speeder_engine.data.interactions import read_interactions
from speeder_engine.errors import ConfigError, DataError

USERS = ["007", "b", "007", "NA"]
ITEMS = ["0012349", "0012349", "x", "y z"]
TIMES = [1378394480, 5, 1378394480, 0]
PLAIN = {"user_id": USERS, "item_id": ITEMS, "rating": [1.0, 2.0, 3.0, 4.0], "timestamp": TIMES}
ATOMIC = {"user_id:token": USERS, "item_id:token": ITEMS, "rating:float": [1, 2, 3, 4], "timestamp:float": TIMES}
AMAZON = {"rating": [1, 2, 3, 4], "asin": ["q"] * 4, "parent_asin": ITEMS, "user_id": USERS}
AMAZON["timestamp"] = [time * 1000 + 999 for time in TIMES]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        *[(f"interactions.{suffix}", PLAIN) for suffix in ("parquet", "csv", "csv.gz", "jsonl", "jsonl.gz")],
        ("made.inter", ATOMIC),
        *[(f"All_Beauty.{suffix}", AMAZON) for suffix in ("jsonl", "jsonl.gz", "csv", "csv.gz")],
    ],
)
def test_every_format_gives_the_same_table(name, columns, tmp_path, write):
    read = read_interactions(write(tmp_path / name, columns))
    assert read.user_ids.tolist() == USERS
    assert read.item_ids.tolist() == ITEMS
    assert read.times.dtype == np.int64
    assert read.times.tolist() == TIMES


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_columns_can_be_named(suffix, tmp_path, write):
    columns = {"who": ["1"], "what": ["02"], "when": [3000], "item_id": ["no"]}
    path = write(tmp_path / f"x.{suffix}", columns)
    read = read_interactions(path, Columns(user="who", item=("absent", "what"), time="when", time_unit="ms"))
    assert (read.user_ids.tolist(), read.item_ids.tolist(), read.times.tolist()) == (["1"], ["02"], [3])


def test_whole_numbers_become_their_decimals(tmp_path, write):
    columns = {"user_id": [1, 2], "item_id": [30, 4], "timestamp": [1, 2]}
    for suffix in ("parquet", "csv", "jsonl"):
        assert read_interactions(write(tmp_path / f"x.{suffix}", columns)).item_ids.tolist() == ["30", "4"]


def test_parquet_dictionaries_large_strings_and_timestamps(tmp_path):
    moments = [datetime.datetime(2020, 1, 1, 0, 0, second, 999_000, datetime.UTC) for second in (0, 1)]
    table = pa.table(
        {
            "user_id": pa.array(["a", "a"]).dictionary_encode(),
            "item_id": pa.array(["01", "02"], pa.large_string()),
            "timestamp": pa.array(moments, pa.timestamp("us", "UTC")),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1)
    read = read_interactions(tmp_path / "x.parquet")
    assert read.user_ids.tolist() == ["a", "a"]
    assert read.times.tolist() == [int(moment.timestamp()) for moment in moments]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("coded", [False, True])
def test_text_of_any_type_is_read_alike(tmp_path, kind, coded):
    columns = {name: pa.array(values, kind) for name, values in (("user_id", USERS), ("item_id", ITEMS))}
    columns["timestamp"] = pa.array(map(str, TIMES), kind)
    if coded:
        columns = {name: column.cast(pa.large_string()).dictionary_encode() for name, column in columns.items()}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    read = read_interactions(tmp_path / "x.parquet")
    assert (read.user_ids.tolist(), read.item_ids.tolist(), read.times.tolist()) == (USERS, ITEMS, TIMES)


def test_times_of_json_may_be_text(tmp_path, write):
    columns = {"user_id": USERS, "item_id": ITEMS, "timestamp": list(map(str, TIMES))}
    assert read_interactions(write(tmp_path / "x.jsonl", columns)).times.tolist() == TIMES
    with pytest.raises(DataError, match="timestamp is 'soon'; a number is needed"):
        read_interactions(write(tmp_path / "y.jsonl", {**columns, "timestamp": ["soon"] * 4}))


@pytest.mark.parametrize(("mark", "shown"), [(";", "';'"), ("\t", r"'\\t'"), ("|", r"'\|'")])
def test_other_separators_are_named(tmp_path, mark, shown):
    (tmp_path / "x.csv").write_text(f"user_id{mark}item_id{mark}timestamp\na{mark}b{mark}1\n")
    with pytest.raises(DataError, match=rf"its cells are separated by {shown}; separate them by commas"):
        read_interactions(tmp_path / "x.csv")


def test_a_table_in_parts_is_no_file(tmp_path):
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(DataError, match=r"x\.parquet: is a folder; a table is one file"):
        read_interactions(tmp_path / "x.parquet")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_without_a_time_column_there_are_no_times(suffix, tmp_path, write):
    path = write(tmp_path / f"x.{suffix}", {"user_id": ["a"], "item_id": ["b"]})
    assert read_interactions(path).times is None
    with pytest.raises(DataError, match=r"no column 'when'; it has 'user_id', 'item_id'"):
        read_interactions(path, Columns(time="when"))


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "inter"])
def test_a_missing_column_lists_those_found(suffix, tmp_path, write):
    path = write(tmp_path / f"x.{suffix}", {"usr": ["a"], "item_id": ["b"]})
    with pytest.raises(DataError, match=rf"x\.{suffix}: no column 'user_id' or .*it has 'usr', 'item_id'"):
        read_interactions(path)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_floats_are_no_ids(suffix, tmp_path, write):
    path = write(tmp_path / f"x.{suffix}", {"user_id": ["a"], "item_id": [7.0], "timestamp": [1]})
    with pytest.raises(DataError, match=r"item_id.*(double|7\.0)"):
        read_interactions(path)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("bad", ["", None])
def test_an_empty_id_names_its_row(bad, suffix, tmp_path, write):
    path = write(tmp_path / f"x.{suffix}", {"user_id": ["a", bad], "item_id": ["b", "c"], "timestamp": [1, 2]})
    with pytest.raises(DataError, match=r"'user_id' is empty in row 2"):
        read_interactions(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user_id": "a", "item_id": "b"}', r"line 2: timestamp is None"),
        ('{"user_id": "a", "item_id": "b", "timestamp": true}', r"line 2: timestamp is True"),
        ('{"user_id": "a", "item_id": "b", "timestamp": 1e400}', r"line 2: timestamp is inf"),
        ('{"user_id": "a", "item_id": ["b"], "timestamp": 1}', r"line 2: item_id is \['b'\]"),
        ('{"user_id": "a", ', r"line 2: not JSON"),
        ("[1]", r"line 2: a JSON object is needed"),
        ("[" * 10_000, r"line 2: not JSON"),
        ('{"user_id": "\\ud800", "item_id": "b", "timestamp": 1}', r"line 2: user_id is .* no valid Unicode text"),
        ('{"user_id": "a", "item_id": "\\ud800", "timestamp": 1}', r"line 2: item_id is .* no valid Unicode text"),
    ],
)
def test_a_bad_json_line_is_named(line, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"user_id": "a", "item_id": "b", "timestamp": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_interactions(path)


def test_a_first_json_line_without_a_time_drops_no_times(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"user_id": "a", "item_id": "b"}\n{"user_id": "a", "item_id": "b", "timestamp": 1}\n')
    with pytest.raises(DataError, match=r"line 2: has timestamp, the first record has none; give every line a time"):
        read_interactions(path)


@pytest.mark.parametrize("name", ["x.csv", "x.inter", "x.parquet"])
@pytest.mark.parametrize("repeated", ["user_id", "item_id", "timestamp"])
def test_a_repeated_column_is_refused(name, repeated, tmp_path):
    names = ["user_id", "item_id", "timestamp", repeated]
    if name == "x.parquet":
        pq.write_table(pa.table([["a"], ["b"], [1], ["c"]], names), tmp_path / name)
    else:
        separator = "," if name == "x.csv" else "\t"
        (tmp_path / name).write_text(separator.join(names) + "\n" + separator.join(["a", "b", "1", "2"]) + "\n")
    with pytest.raises(DataError, match=f"has 2 columns '{repeated}'; keep one"):
        read_interactions(tmp_path / name)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_milliseconds_are_not_guessed(suffix, tmp_path, write):
    path = write(tmp_path / f"x.{suffix}", {"user_id": ["a"], "item_id": ["b"], "timestamp": [1378394480123]})
    with pytest.raises(DataError, match=r"time_unit='ms'"):
        read_interactions(path)
    assert read_interactions(path, Columns(time_unit="ms")).times.tolist() == [1378394480]


@pytest.mark.parametrize("bad", ["2013-01-01", "1_000", ""])
def test_an_unreadable_time_is_an_error(bad, tmp_path):
    (tmp_path / "x.csv").write_text(f"user_id,item_id,timestamp\na,b,1\na,c,{bad}\n")
    with pytest.raises(DataError, match=rf"column 'timestamp', row 2: '{bad}' is no number"):
        read_interactions(tmp_path / "x.csv")


def test_times_of_every_number_type(tmp_path):
    for dtype in (pa.uint64(), pa.int32(), pa.float64(), pa.string()):
        times = pa.array([7, 5]).cast(dtype)
        table = pa.table({"user_id": ["a", "b"], "item_id": ["c", "d"], "timestamp": times})
        pq.write_table(table, tmp_path / "x.parquet")
        assert read_interactions(tmp_path / "x.parquet").times.tolist() == [7, 5]


@pytest.mark.parametrize(
    ("time", "message"),
    [
        (-(2**63), "-9223372036854775808 s is before the year -1000"),
        (2**63 - 1, "9223372036854775807 s is past the year 5000"),
    ],
)
def test_times_at_the_ends_of_their_type(time, message, tmp_path):
    pq.write_table(pa.table({"user_id": ["a"], "item_id": ["c"], "timestamp": [time]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        read_interactions(tmp_path / "x.parquet")


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"no such file"):
        read_interactions(tmp_path / "absent.csv")
    (tmp_path / "x.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"not one of \.parquet"):
        read_interactions(tmp_path / "x.xlsx")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"x\.parquet: can't be read"):
        read_interactions(tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match=r"no interactions"):
        read_interactions(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\na,b,1\na,b\n")
    with pytest.raises(DataError, match=r"Expected 3 columns, got 2"):
        read_interactions(tmp_path / "x.csv")
    whole = gzip.compress(b'{"user_id": "a", "item_id": "b", "timestamp": 1}\n' * 99)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: can't be read"):
        read_interactions(tmp_path / "x.jsonl.gz")


def test_spreadsheets_unicode_and_empty_files_are_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("user_id,item_id\n1,2\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"x\.csv: is UTF-16 text; save it as UTF-8"):
        read_interactions(path)
    for content in ("", "\n \n"):
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(DataError, match=r"x\.jsonl: there is nothing in it; write a JSON object a line"):
            read_interactions(tmp_path / "x.jsonl")


def test_columns_are_checked():
    for bad in ({"user": ""}, {"item": ()}, {"time": 3}, {"time_unit": "us"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Columns(**bad)
