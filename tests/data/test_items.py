import datetime
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speeder_engine.data.columns import Columns
from speeder_engine.data.items import Items, read_items
from speeder_engine.errors import DataError, SpeederWarning

IDS = ("0012349", "2", "NA")
TITLES = ('The "Kid"', "Who?", "Dr. No")
TEXTS = ('The "Kid". 1921. Comedy, Drama. A tramp, a child.', "Who? 1999. Horror", "Dr. No. 1962. A spy.")
PLAIN = {
    "item_id": list(IDS),
    "title": list(TITLES),
    "year": [1921, 1999, 1962],
    "genres": ["Comedy|Drama", "Horror", ""],
    "overview": ["A tramp, a child.", "", "A spy."],
}
NAMES = {"item_id": "item_id:token", "title": "movie_title:token_seq", "year": "release_year:token"}
ATOMIC = {NAMES.get(name, f"{name}:token_seq"): column for name, column in PLAIN.items()}


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        *[(f"items.{suffix}", PLAIN) for suffix in ("parquet", "csv", "csv.gz", "jsonl", "jsonl.gz")],
        ("x.item", ATOMIC),
    ],
)
def test_every_format_gives_the_same_items(name, columns, tmp_path, write):
    read = read_items(write(tmp_path / name, columns))
    assert (read.item_ids, read.titles) == (IDS, TITLES)
    assert [text.replace("1962. .", "1962.") for text in read.texts] == list(TEXTS)
    assert (len(read), read.images, dict(read.vectors)) == (3, None, {})
    assert read.rows["NA"] == 2


def test_amazon_metadata(tmp_path):
    record = {
        "main_category": "Books",
        "title": "A  Book\n| Large",
        "average_rating": 4.5,
        "features": ["Soft.", "Blue."],
        "description": ["One.", "", "Two."],
        "images": [{"large": "https://example.org/1.jpg"}],
        "categories": ["Books", ["Poetry"]],
        "details": {"Pages": "3"},
        "parent_asin": "0001",
    }
    path = tmp_path / "meta_Books.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps({"parent_asin": "B2", "title": None}) + "\n")
    with pytest.warns(SpeederWarning, match=r"1 of 2 items have no title: 'B2'"):
        read = read_items(path)
    assert read.item_ids == ("0001", "B2")
    assert read.titles == ("A Book | Large", "")
    assert read.texts == ("A Book | Large. Books, Poetry. One. Two. Soft. Blue.", "")
    assert read.images is None


def test_whole_numbers_and_named_columns(tmp_path, write):
    path = write(tmp_path / "x.jsonl", {"id": [7], "label": ["Seven"], "plot": ["It is late."], "cast": ["A|B"]})
    read = read_items(path, Columns(item="id", title="label", text=("cast", "plot")))
    assert (read.item_ids, read.titles, read.texts) == (("7",), ("Seven",), ("Seven. A, B. It is late.",))
    with pytest.raises(DataError, match=r"no column 'plots'; it has 'id', 'label'"):
        read_items(path, Columns(item="id", title="label", text=("plots",)))
    with pytest.raises(DataError, match=r"no column 'name'"):
        read_items(path, Columns(item="id", title="name"))


def test_dates_and_decimals_are_text(tmp_path):
    moment = datetime.datetime(1995, 11, 22, 20, 15, tzinfo=datetime.UTC)
    columns = {"item_id": ["1", "2"], "title": ["Toy Story", "Heat"]}
    columns["year"] = pa.array([moment.date(), None], pa.date32())
    columns["genres"] = pa.array([[moment], []], pa.list_(pa.timestamp("us", "UTC")))
    columns["description"] = pa.array([Decimal("3.50"), None], pa.decimal128(5, 2))
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    assert read_items(tmp_path / "items.parquet").texts == ("Toy Story. 1995-11-22. 1995-11-22. 3.50", "Heat")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_a_doubled_id_is_named(suffix, tmp_path, write):
    path = write(tmp_path / f"x.{suffix}", {"item_id": ["a", "01", "01"], "title": ["x", "y", "z"]})
    with pytest.raises(DataError, match=r"item '01' is there more than once"):
        read_items(path)
    with pytest.raises(DataError, match=r"'01' is there more than once"):
        Items(("01", "01"), ("a", "b"), ("a", "b"))


def test_a_repeated_column_is_refused(tmp_path):
    pq.write_table(pa.table([["a"], ["x"], ["y"]], ["item_id", "title", "title"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="has 2 columns 'title'; keep one"):
        read_items(tmp_path / "x.parquet")
    images = pa.table([["a"], ["x"], [b"1"], [b"2"]], ["item_id", "title", "image", "image"])
    pq.write_table(images, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="has 2 columns 'image'; keep one"):
        read_items(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ('"title": "\\ud800"', r"line 1: title is .* no valid Unicode text; mend it"),
        ('"title": "x", "genres": ["a", "\\ud800"]', r"line 1: genres is .* no valid Unicode text; mend it"),
        (
            '"title": ' + "[" * 900 + "]" * 900,
            r"line 1: title is list; text, a number, a date or a list of them is needed",
        ),
    ],
)
def test_text_that_could_not_be_saved_is_refused(cells, message, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"item_id": "a", ' + cells + "}\n")
    with pytest.raises(DataError, match=message):
        read_items(tmp_path / "x.jsonl")


def test_columns_that_hold_no_text_or_id(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"item_id": "a", "title": "x", "description": {"a": 1}}\n')
    with pytest.raises(DataError, match=r"line 1: description is dict"):
        read_items(path)
    path.write_text('{"item_id": 1.5, "title": "x"}\n')
    with pytest.raises(DataError, match=r"line 1: item_id is 1\.5"):
        read_items(path)
    path.write_text("")
    with pytest.raises(DataError, match=r"x\.jsonl: no items in it"):
        read_items(path)


@pytest.mark.parametrize("as_struct", [False, True])
def test_a_column_of_bytes_is_the_image_source(as_struct, tmp_path):
    contents = [b"one", None, b"three"]
    images = [content and {"bytes": content, "path": "p"} for content in contents] if as_struct else contents
    table = pa.table({"item_id": ["01", "02", "03"], "title": ["a", "b", "c"], "image": images})
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=2)
    source = read_items(tmp_path / "items.parquet").images
    assert [source.read(item_id) for item_id in ("03", "01", "02", "3")] == [b"three", b"one", None, None]
    assert [item_id in source for item_id in ("01", "02", "03", "3")] == [True, False, True, False]


def test_an_image_column_of_addresses_is_no_source(tmp_path, write):
    path = write(tmp_path / "x.parquet", {"item_id": ["a"], "title": ["x"], "image": ["https://example.org"]})
    assert read_items(path).images is None
    with pytest.raises(DataError, match=r"column 'image' holds string; a column of bytes"):
        read_items(path, Columns(image=("image", "cover")))
