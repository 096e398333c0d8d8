"""Settings of baselines: searched on any data folder, kept, and taken by the study of the same data."""

import json
import sys

import numpy as np
import pytest
import tune_baselines
from baseline_settings import read_settings, write_settings
from study_runs import Run, do

from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import leave_one_out
from speeder_engine.errors import ConfigError
from speeder_engine.evaluation.baselines.item_knn import ItemKNN, ItemKNNConfig
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.evaluation.report import Report
from speeder_engine.synthetic import write_synthetic_dataset

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::speeder_engine.errors.SpeederWarning"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_synthetic_dataset(tmp_path_factory.mktemp("data") / "made", num_users=120, num_items=100)


@pytest.fixture
def search(data, tmp_path, monkeypatch, capsys):
    """Runs the script; returns the runs that it told, the log's lines and the best settings."""
    log, best = tmp_path / "runs.jsonl", tmp_path / "results" / "made.json"

    def run(*options, folder=data):
        given = [str(folder), *options, "--out", str(log), "--best", str(best), "--rounds", "1", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["tune_baselines.py", *given])
        tune_baselines.main()
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [line for line in told if "best" not in line], lines, best

    return run


def test_the_best_run_is_kept_and_no_run_is_repeated(search, data):
    told, lines, best = search("itemknn", "--axes", "window,decay")
    assert len(told) == len(lines) == 1 + 8 + 7 and all(line["data"] == "made" for line in lines)
    assert all(line["seconds"] >= 0 for line in lines)
    chosen = json.loads(best.read_text())["systems"]["itemknn"]
    assert chosen["ndcg@10"] == max(line["ndcg@10"] for line in lines) > lines[0]["ndcg@10"]
    assert chosen["runs"] == len(lines)
    split = leave_one_out(load_dataset(data))
    config = read_settings(best, split.dataset)["itemknn"]
    scorer = ItemKNN.fit(split.train, split.dataset.num_items, config)
    found = evaluate(scorer, split.queries("validation"), None, show_progress=False).metrics["ndcg@10"]
    assert found == pytest.approx(chosen["ndcg@10"], abs=1e-5)
    again, same, _ = search("itemknn", "--axes", "window,decay")
    assert again == [] and same == lines


def test_trained_systems_are_searched_in_a_handful_of_runs(search, data):
    told, _, best = search(
        "sasrec", "itemknn", "--axes", "dim,dropout,learning_rate,last", "--epochs", "1", "--patience", "1"
    )
    trained = [run["settings"] for run in told if run["system"] == "sasrec"]
    assert len(trained) == 4 and all((each["epochs"], each["patience"]) == (1, 1) for each in trained)
    settings = read_settings(best, load_dataset(data))
    assert settings.keys() == {"sasrec", "itemknn"} and settings["sasrec"].epochs == 1


def test_an_axis_that_no_system_has_is_refused(search):
    with pytest.raises(ConfigError, match=r"--axes: no dimm; there are window, .*, dropout, learning_rate, dim"):
        search("itemknn", "sasrec", "--axes", "window, dimm")


def test_runs_on_other_data_count_for_nothing(search, tmp_path, data):
    _, first, best = search("itemknn", "--axes", "last")
    other = write_synthetic_dataset(tmp_path / "other", num_users=90, num_items=100, seed=5)
    told, lines, _ = search("itemknn", "--axes", "last", folder=other)
    assert len(told) == len(first) and {line["data"] for line in lines} == {"made", "other"}
    assert json.loads(best.read_text())["systems"]["itemknn"]["runs"] == len(told)
    with pytest.raises(ConfigError, match=r"chosen on other data \(other\), not on made"):
        read_settings(best, load_dataset(data))


def test_the_study_takes_the_settings_it_is_given(data, tmp_path):
    split, settings = leave_one_out(load_dataset(data)), tmp_path / "made.json"
    config = ItemKNNConfig(window=1, decay=0.4, last=1)
    write_settings(settings, split.dataset, {"itemknn": {"settings": vars(config)}})
    run, found = Run("itemknn", "itemknn", 0), {}
    for name, given in (("searched", settings), ("built in", None)):
        do(run, data, tmp_path, "study", given)
        found[name] = Report.load(run.path(tmp_path)).ranks
    scorer = ItemKNN.fit(split.train, split.dataset.num_items, config)
    wanted = evaluate(scorer, split.queries("test"), None, show_progress=False).ranks
    np.testing.assert_array_equal(found["searched"], wanted)
    assert not np.array_equal(found["built in"], wanted)


def test_what_are_no_settings_is_refused(data, tmp_path):
    dataset, path = load_dataset(data), tmp_path / "made.json"
    with pytest.raises(ConfigError, match="not settings of baselines"):
        read_settings(path, dataset)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="not settings of baselines"):
        read_settings(path, dataset)
    write_settings(path, dataset, {"bert": {"settings": {}}})
    with pytest.raises(ConfigError, match="settings of bert; only itemknn, sasrec, gru4rec, hstu"):
        read_settings(path, dataset)
    write_settings(path, dataset, {"itemknn": {"settings": {"windows": 3}}})
    with pytest.raises(ConfigError, match="windows"):
        read_settings(path, dataset)
