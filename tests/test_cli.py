"""The command line as a user meets it: what it prints, what it refuses, how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import speeder
from interrupts import take_interrupts
from reference import make_tiny, make_titled

import speeder_engine
from speeder_engine import Engine
from speeder_engine.catalogue import Catalogue
from speeder_engine.config import CalendarConfig
from speeder_engine.synthetic import write_synthetic_dataset

CALENDAR = CalendarConfig(first_second=0, bucket_seconds=1000, num_buckets=5)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "engine"
    make_tiny().parts().save(out)
    return out


def test_help_names_every_command_and_needs_no_torch():
    code = (
        "import sys; sys.argv = ['speeder', '--help']\n"
        "from speeder_engine.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    for command in ("demo", "train", "evaluate", "export", "recommend", "inspect"):
        assert command in done.stdout
    assert done.stdout.strip().endswith("False")


def test_recommend_one_history(engine_dir):
    done = speeder("recommend", engine_dir, "--history", "0001,0002", "--history", "0003", "-k", 3, "--json")
    assert done.returncode == 0, done.stderr
    expected = Engine.load(engine_dir).recommend(["0001", "0002", "0003"], k=3)
    answer = json.loads(done.stdout)
    assert answer["items"] == list(expected.items)
    assert answer["scores"] == pytest.approx(expected.scores)
    for_people = speeder("recommend", engine_dir, "--history", "0001", "-k", 2, "--candidates", "0005,0006").stdout
    assert "Title 0005" in for_people and "Title 0006" in for_people


def test_the_version_is_the_packages():
    done = speeder("--version")
    assert (done.returncode, done.stdout) == (0, f"speeder-engine {version('speeder-engine')}\n")
    assert speeder_engine.__version__ == version("speeder-engine")


def test_recommend_with_times_and_in_few_bits(tmp_path):
    make_tiny(calendar=CALENDAR).parts().save(tmp_path / "engine")
    few = ["--dtype", "bfloat16", "--weights", "int8"]
    done = speeder("recommend", tmp_path / "engine", "--history", "0001,0002", "--times", "10,4500", *few, "--json")
    assert done.returncode == 0, done.stderr
    engine = Engine.load(tmp_path / "engine", dtype="bfloat16", weights="int8", kv_budget="0")
    expected = engine.recommend(["0001", "0002"], times=[10, 4500])
    assert json.loads(done.stdout)["scores"] == list(expected.scores) != list(engine.recommend(["0001", "0002"]).scores)
    assert done.stderr == ""
    without = speeder("recommend", tmp_path / "engine", "--history", "0001")
    assert without.stderr == "warning: --times is not given, which this model reads; all times count as not known\n"
    wrong = speeder("recommend", tmp_path / "engine", "--history", "0001", "--times", "noon")
    assert "--times: expected Unix seconds between commas, got 'noon'" in wrong.error


def test_recommend_by_titles(tmp_path):
    make_titled().parts().save(tmp_path / "engine")
    named = ["--history", "0001", "--candidates", "0010,0011,0012", "--head", "title", "--json"]
    done = speeder("recommend", tmp_path / "engine", *named)
    assert done.returncode == 0, done.stderr
    expected = Engine.load(tmp_path / "engine").recommend(["0001"], candidates=["0010", "0011", "0012"], head="title")
    assert json.loads(done.stdout)["items"] == list(expected.items)


def test_torchrun_starts_the_command_as_a_module():
    command = [sys.executable, "-m", "speeder_engine.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert done.stdout == speeder("--version").stdout


def test_recommend_for_a_file(engine_dir, tmp_path):
    histories = [["0001", "0002"], [], ["0005"]] * 700  # more than one batch
    users = [f"{i:05d}" for i in range(2100)]
    pq.write_table(pa.table({"user_id": users, "history": histories}), tmp_path / "users.parquet")
    done = speeder(
        "recommend", engine_dir, "--input", tmp_path / "users.parquet", "--output", tmp_path / "recs.parquet", "-k", 4
    )
    assert done.returncode == 0, done.stderr
    assert "2,100 users" in done.stdout
    table = pq.read_table(tmp_path / "recs.parquet")
    assert table["user_id"].to_pylist() == users
    engine = Engine.load(engine_dir)
    for i, history in enumerate(histories[:3]):
        expected = engine.recommend(history, k=4)
        assert table["items"][2097 + i].as_py() == list(expected.items)
        assert table["scores"][i].as_py() == pytest.approx(expected.scores)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recs.parquet", "users.parquet"]


def test_a_file_gives_times_to_a_model_that_reads_them(tmp_path):
    make_tiny(calendar=CALENDAR).parts().save(tmp_path / "engine")
    engine = Engine.load(tmp_path / "engine")
    histories, times = [["0001", "0002"], ["0003"], []], [[10, 4500], None, []]
    source, target = tmp_path / "users.parquet", tmp_path / "recs.parquet"
    pq.write_table(pa.table({"history": histories, "times": times}), source)
    done = speeder("recommend", tmp_path / "engine", "--input", source, "--output", target)
    assert (done.returncode, done.stderr) == (0, "")
    expected = [list(engine.recommend(h, times=t).scores) for h, t in zip(histories, times, strict=True)]
    assert pq.read_table(target)["scores"].to_pylist() == expected
    pq.write_table(pa.table({"history": histories}), source)
    done = speeder("recommend", tmp_path / "engine", "--input", source, "--output", target)
    assert done.returncode == 0 and "has no column `times`, which this model reads" in done.stderr
    assert pq.read_table(target)["scores"].to_pylist() != expected
    for wrong, message in (([[10], None, []], "times: 1 for 2 interactions"), (["x", "y", "z"], "expected Unix sec")):
        pq.write_table(pa.table({"history": histories, "times": wrong}), source)
        assert message in speeder("recommend", tmp_path / "engine", "--input", source, "--output", target).error


def test_a_file_may_hold_ids_and_times_as_training_data_may(tmp_path):
    tiny = make_tiny(calendar=CALENDAR)
    parts = tiny.parts()
    table = parts.catalogue.table()
    numbered = replace(table, item_ids=tuple(str(int(item_id)) for item_id in table.item_ids))
    replace(parts, catalogue=Catalogue(numbered, parts.catalogue.served_tokens())).save(tmp_path / "engine")
    source, target, scores = tmp_path / "users.parquet", tmp_path / "recs.parquet", []
    moments = pa.array([[10_000, 4_500_999], None], pa.list_(pa.timestamp("ms", "Europe/Berlin")))
    for histories, times in (([["1", "2"], ["3"]], [[10, 4500], None]), ([[1, 2], [3]], moments)):
        pq.write_table(pa.table({"history": histories, "times": times}), source)
        done = speeder("recommend", tmp_path / "engine", "--input", source, "--output", target)
        assert (done.returncode, done.stderr) == (0, "")
        scores.append(pq.read_table(target)["scores"].to_pylist())
    assert scores[0] == scores[1]


def test_inspect(engine_dir):
    summary = json.loads(speeder("inspect", engine_dir, "--json").stdout)
    assert summary["num_items"] == 120
    assert summary["window"] == 12
    # keys and values of 3 layers, 2 heads of 8, in blocks of 16 positions, at 4 bytes
    assert summary["kv_bytes_per_user"]["float32"] == 2 * 3 * 2 * 8 * 16 * 4
    # a byte an element, and a scale of 4 bytes for every 8 of them
    assert summary["kv_bytes_per_user"]["int8"] == summary["kv_bytes_per_user"]["fp8"] == 2 * 3 * 2 * (8 + 4) * 16
    assert summary["users_per_gib"]["int8"] == 2**30 // summary["kv_bytes_per_user"]["int8"]
    assert summary["memory"]["bfloat16"] * 2 == summary["memory"]["float32"]
    table = speeder("inspect", engine_dir)
    assert table.returncode == 0
    assert summary["revision"] in table.stdout
    assert all(name in table.stdout for name in ("memory, bfloat16", "KV alone, fp8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{tmp}"], "no engine directory"),
        (["recommend", "{engine}", "--history", "0001", "-k", "0"], "k: expected a whole number of at least 1, got 0"),
        (["recommend", "{engine}", "--history", "nope"], "history: unknown item 'nope'"),
        (["recommend", "{engine}", "--history", "nope"], "pass ids that are in engine.catalogue, or --skip-unknown"),
        (["recommend", "{engine}", "--history", "0001,,0002"], "an empty one between commas"),
        (["recommend", "{engine}", "--candidates", ""], "--candidates names no item; leave it out to search"),
        (["recommend", "{engine}", "--input", "x.parquet"], "--input and --output go together"),
        (["export", "onnx", "{engine}", "{tmp}/o", "--parity-users", "9" * 20], "--parity-users"),
        (["recommend", "{engine}", "--input", "{tmp}/x.parquet", "--output", "{tmp}/y.parquet"], "no such file"),
        (["recommend", "{engine}", "--device", "tpu"], "device: 'tpu'"),
        (["recommend", "{engine}", "--history", "0001", "--head", "rank"], "pass candidates, or use 'retrieve'"),
        (["recommend", "{engine}", "--history", "0001", "--candidates", "0002", "--head", "title"], "title head"),
        (["evaluate", "popularity", "--data", "{tmp}", "--head", "best"], "head: 'best' is no way to answer"),
        (["recommend"], "Missing argument"),
        (["recommend", "--bogus"], "No such option"),
        (["frobnicate"], "No such command"),
        (["export", "engine", "{tmp}", "{tmp}/out"], "no checkpoint here"),
        (["evaluate", "gossip", "--data", "{tmp}"], "neither a checkpoint nor an engine directory nor a baseline"),
        (["train", "{tmp}", "--out", "{tmp}/c"], "interactions"),
        (["train", "{tmp}", "--out", "{engine}"], "is not empty and no checkpoint"),  # said before the data is read
        (["train", "{tmp}", "--out", "{tmp}/c", "--recipe", "soup"], "recipe soup: no such file"),
        (["train", "{tmp}", "--out", "{tmp}/c", "--column", "shoe=size"], "column 'shoe=size': write ROLE=NAME"),
        (["demo", "--data", "{tmp}/nowhere", "--out", "{tmp}/demo"], "nowhere"),
    ],
)
def test_every_failure_is_one_line_and_exit_code_1(engine_dir, tmp_path, arguments, message):
    done = speeder(*(a.format(engine=engine_dir, tmp=tmp_path) for a in arguments))
    assert message in done.error


HISTORIES = pa.array([["0001"], ["0002"]])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"user": ["a"]}), "has no column `history`"),
        (pa.table({"history": ["0001"]}), "expected lists of item ids"),
        (pa.table({"history": [["0001"], None]}), "a history is null"),
        (pa.table({"history": [["0001"], ["nope"]]}), "unknown item 'nope'"),
        (pa.table([HISTORIES, [1, 2], [3, 4]], ["history", "user_id", "user_id"]), "has 2 columns `user_id`; keep one"),
        (pa.table([HISTORIES, HISTORIES], ["history", "history"]), "has 2 columns `history`; keep one"),
    ],
)
def test_a_bad_file_leaves_no_output(engine_dir, tmp_path, table, message):
    pq.write_table(table, tmp_path / "users.parquet")
    target = tmp_path / "recs.parquet"
    done = speeder("recommend", engine_dir, "--input", tmp_path / "users.parquet", "--output", target)
    assert done.returncode == 1 and message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["users.parquet"]


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"history": HISTORIES}), path, compression="none")
    return path


def test_a_k_that_can_not_be_is_no_rows_fault(engine_dir, tmp_path, users):
    done = speeder("recommend", engine_dir, "--input", users, "--output", tmp_path / "recs.parquet", "-k", 0)
    assert done.error.startswith("error: k: expected a whole number of at least 1, got 0")
    assert [path.name for path in tmp_path.iterdir()] == ["users.parquet"]


def test_a_damaged_page_is_the_inputs_fault(engine_dir, tmp_path, users):
    whole = users.read_bytes()
    users.write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    done = speeder("recommend", engine_dir, "--input", users, "--output", tmp_path / "recs.parquet")
    assert f"{users}: not a readable Parquet file" in done.error
    assert [path.name for path in tmp_path.iterdir()] == ["users.parquet"]


def test_an_output_is_written_where_a_link_leads(engine_dir, tmp_path, users):
    (tmp_path / "link").symlink_to(tmp_path / "recs.parquet")
    (tmp_path / ".recs.parquet.01234567.tmp").write_text("of a killed run")
    assert speeder("recommend", engine_dir, "--input", users, "--output", tmp_path / "link").returncode == 0
    assert pq.read_table(tmp_path / "recs.parquet").num_rows == 2
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob(".*"))


def test_what_is_no_file_is_not_replaced(engine_dir, tmp_path, users):
    os.mkfifo(tmp_path / "fifo")
    done = speeder("recommend", engine_dir, "--input", users, "--output", tmp_path / "fifo")
    assert f"{tmp_path / 'fifo'}: something else stands where a file must go" in done.error
    assert (tmp_path / "fifo").is_fifo()
    (tmp_path / "loop").symlink_to("loop")
    done = speeder("recommend", engine_dir, "--input", users, "--output", tmp_path / "loop")
    assert f"{tmp_path / 'loop'}: can't be written: Too many levels of symbolic links" in done.error


def test_the_input_is_not_overwritten(engine_dir, tmp_path, users):
    before = users.read_bytes()
    for target in (users, tmp_path, tmp_path / "\udcff.parquet"):
        done = speeder("recommend", engine_dir, "--input", users, "--output", target)
        assert done.returncode == 1 and "choose another --output" in done.stderr
    assert users.read_bytes() == before


def test_parquet_is_not_written_under_another_formats_name(engine_dir, tmp_path, users):
    done = speeder("recommend", engine_dir, "--input", users, "--output", tmp_path / "recs.csv")
    assert f"'{tmp_path}/recs.csv': what is written is Parquet, not .csv; choose another --output" in done.error
    assert not (tmp_path / "recs.csv").exists()


def test_skipped_ids_are_counted_and_listed(engine_dir, tmp_path):
    histories = [["0001", "x"], ["y", "z"], []]
    pq.write_table(pa.table({"user_id": [1, 2, 3], "history": histories}), tmp_path / "users.parquet")
    target = tmp_path / "recs.parquet"
    done = speeder("recommend", engine_dir, "--input", tmp_path / "users.parquet", "--output", target, "--skip-unknown")
    assert done.returncode == 0
    assert "warning: " in done.stderr and "3 item ids are not in the catalogue" in done.stderr
    assert pq.read_table(target)["unknown"].to_pylist() == [["x"], ["y", "z"], []]


def test_an_interrupted_command_says_so_and_fails(tmp_path):
    code = "from speeder_engine.cli import main; print('ready', flush=True); main()"
    folder = write_synthetic_dataset(tmp_path / "data", num_users=300, num_items=120)
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", str(folder), "--out", str(tmp_path / "c")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=take_interrupts,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().endswith("interrupted")
    assert "Traceback" not in errors


def test_a_command_that_a_supervisor_ends_leaves_nothing_half_written(tmp_path):
    code = """
import sys, time
from pathlib import Path
from speeder_engine import inspection
from speeder_engine.cli import main
from speeder_engine.files import replace_folder

def write(out):
    with replace_folder(Path(out)) as beside:
        (beside / "half").touch()
        print("ready", flush=True)
        time.sleep(60)

inspection.inspect_engine = write
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "inspect", str(tmp_path / "c")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=take_interrupts,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert len(list(tmp_path.glob(".c.*.tmp/half"))) == 1
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().endswith("interrupted")
    assert "Traceback" not in errors and not list(tmp_path.glob(".c.*"))
