"""The study on a made catalogue: runs are kept and not repeated, and become rows, pairs, groups and tables."""

import json
import subprocess
import sys

import numpy as np
import pytest
from command import script
from results_tables import tables
from study import Plan
from study_report import write_report
from study_runs import Run, do
from study_variants import VARIANTS

from speeder_engine.synthetic import write_synthetic_dataset
from speeder_engine.training.recipe import load_recipe

RECIPE = """
instruction: "Next:"
window: 20
collaborative: {epochs: 1}
backbone: {hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 64, vocab_size: 300}
heads: {rank: false}
rank_weight: 0
order_weight: 0
calendar_days: 7
stages:
  - {name: S1, modalities: [text], epochs: 1, learning_rate: 0.003}
  - {name: S2, modalities: [text, collaborative, image], epochs: 1, learning_rate: 0.003}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::speeder_engine.errors.SpeederWarning")
def test_runs_are_kept_and_become_results(root, tmp_path):
    data = write_synthetic_dataset(tmp_path / "data", num_users=120, num_items=100)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    work = tmp_path / "work"
    asked = [("speeder", "declared", 0), ("speeder", "declared", 1), ("speeder", "cold items", 0)]
    others = [("speeder", "shuffled images", 0), ("speeder", "window of 200", 0), ("itemknn", "itemknn", 0)]
    for run in [*asked, *others]:
        metrics = do(Run(*run), data, work, str(tmp_path / "tiny.yaml"))
        assert 0 < metrics["hr@20"] <= 1
    given = [str(data), "systems", "--work", str(work), "--seeds", "0,1", "--only", "declared; itemknn"]
    command = [sys.executable, str(root / "bench" / "study.py"), *given]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "systems: 0 runs to do\n"
    refused = script(root / "bench" / "study.py", *given[:-1], "declared; itmknn")
    assert refused.returncode == 1 and "--only: no itmknn; there are popularity, " in refused.stderr
    out = tmp_path / "results" / "made.json"
    write_report(data, work, out)
    results = json.loads(out.read_text())
    rows = {(row["system"], row["variant"], row["metric"]): row for row in results["rows"]}
    declared = rows["speeder", "declared", "hr@10"]
    assert declared["seeds"] == 2 and declared["low"] <= declared["mean"] <= declared["high"]
    assert not declared["uses_time"] and rows["itemknn", "itemknn", "vhr@1"]["seeds"] == 1
    pairs = {(pair["variant"], pair["against"], pair["metric"]): pair for pair in results["paired"]}
    difference = declared["mean"] - rows["itemknn", "itemknn", "hr@10"]["mean"]
    assert np.isclose(pairs["declared", "itemknn", "hr@10"]["mean"], difference)
    assert ("shuffled images", "declared", "ndcg@10") in pairs
    shuffled = "history shuffled but for its last item"
    for told, against in (
        (shuffled, "declared"),
        (f"{shuffled}, for the decoder alone", "declared"),
        (shuffled, "itemknn"),
    ):
        assert (told, against, "hr@10") in pairs
    assert (work / "reports" / "itemknn+live_popularity@itemknn+live_popularity@0.npz").exists()
    assert {"length", "popularity", "item"} <= {row["by"] for row in results["groups"]}
    cold = [row for row in results["groups"] if row["by"] == "item"]
    alone = {"cold items", "cold items, among themselves"}
    assert {row["variant"] for row in cold} == {*alone, "declared, which was trained on them"}
    tenth = [
        row["mean"] for row in cold if row["metric"] == "hr@10" and row["variant"] == "cold items, among themselves"
    ]
    assert tenth == [1.0]  # of ten items
    curves = {curve["name"]: curve["x"] for curve in results["curves"]}
    cut = "history cut to its last items"
    assert curves == {cut: [1, 2, 5, 10, 20], f"{cut}, window of 200": [1, 2, 5, 10, 20, 50, 100, 200]}
    told = "\n".join(tables(results))
    assert f"itemknn ({shuffled}" not in told
    assert "The declared model's difference to each" in told and "Ablations without the query's time" in told


@pytest.mark.parametrize("recipe", ["study", "study-long"])
def test_a_variant_is_one_change_of_its_recipe(recipe):
    declared = {timed: load_recipe(f"{recipe}{'-time' if timed else ''}") for timed in (False, True)}
    for name, variant in VARIANTS.items():
        config, base = variant.config(recipe, 0), declared[variant.with_time]
        epochs = [sum(stage.epochs for stage in each.stages) for each in (config, base)]
        assert epochs[0] == epochs[1], name
        changed = {key for key, value in config.to_json().items() if value != base.to_json()[key]}
        assert variant.changes(recipe) == bool(changed or variant.alter), name


def test_what_a_recipe_has_already_is_not_run_again():
    planned = {name: {run.variant for run in Plan("ablations", (0,)).wanted(name)} for name in ("study", "study-long")}
    both = planned["study"] & planned["study-long"]
    assert {"no followers", "no positions", "all at once", "text alone", "window of 200"} <= both
    of_study = {"no times", "followers both ways", "tuned item vectors", "not calibrated, with time"}
    assert planned["study"] - both == of_study
    assert planned["study-long"] - both == {"times in weeks", "followers one way", "calibrated, with time"}


def test_stages_are_made_of_the_recipes_own():
    stages = load_recipe("study-long").stages
    assert [stage.modalities for stage in VARIANTS["no image"].config("study-long", 0).stages] == [
        ("text",),
        ("text", "collaborative"),
    ]
    (whole,) = VARIANTS["all at once"].config("study-long", 0).stages
    assert set(whole.modalities) == {"text", "image", "collaborative"} and whole.learning_rate == 0.003
    turned = VARIANTS["image before collaborative"].config("study-long", 0).stages
    assert [stage.modalities[-1] for stage in turned] == ["text", "image", "collaborative"]
    assert [stage.epochs for stage in turned] == [stage.epochs for stage in stages]
    assert {stage.ramp for stage in VARIANTS["no ramp"].config("study-long", 0).stages} == {0.0}


def test_bad_input_ends_in_one_line(root, tmp_path):
    for name, *given in (
        ["study.py", tmp_path / "nothing", "systems", "--work", tmp_path / "work"],
        ["tune_baselines.py", tmp_path / "nothing", "itemknn", "--out", tmp_path / "runs.jsonl"],
        ["packing.py", tmp_path / "nothing"],
        ["int8_accuracy.py", tmp_path / "engine", tmp_path / "nothing"],
    ):
        done = script(root / "bench" / name, *given)
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.startswith(f"{name}: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())
