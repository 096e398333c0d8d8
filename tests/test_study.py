"""The study on a made catalogue: runs are kept and not repeated, and become rows, pairs, groups and tables."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from speeder_engine.synthetic import write_synthetic_dataset

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


def bench(root: Path, script: str, *arguments: object) -> str:
    command = [sys.executable, str(root / "bench" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_runs_are_kept_and_become_results(root, tmp_path):
    data = write_synthetic_dataset(tmp_path / "data", num_users=150, num_items=100)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    given = (data, "--work", tmp_path / "work", "--recipe", tmp_path / "tiny.yaml", "--workers", 1)
    only = "declared;popularity;itemknn"
    found = bench(root, "study.py", *given, "systems", "--seeds", "0,1", "--only", only)
    assert found.startswith("systems: 4 runs to do")
    assert bench(root, "study.py", *given, "systems", "--seeds", "0,1", "--only", only) == "systems: 0 runs to do\n"
    bench(root, "study.py", *given, "controls", "--seeds", 0, "--only", "cold items;shuffled images")
    out = tmp_path / "results" / "made.json"
    bench(root, "study.py", data, "report", "--work", tmp_path / "work", "--out", out)
    results = json.loads(out.read_text())
    rows = {(row["system"], row["variant"], row["metric"]): row for row in results["rows"]}
    declared = rows["speeder", "declared", "hr@10"]
    assert declared["seeds"] == 2 and declared["low"] <= declared["mean"] <= declared["high"]
    assert not declared["uses_time"] and rows["itemknn", "itemknn", "vhr@1"]["seeds"] == 1
    pairs = {(pair["variant"], pair["against"], pair["metric"]): pair for pair in results["paired"]}
    difference = declared["mean"] - rows["itemknn", "itemknn", "hr@10"]["mean"]
    assert np.isclose(pairs["declared", "itemknn", "hr@10"]["mean"], difference)
    assert ("shuffled images", "declared", "ndcg@10") in pairs
    assert {"length", "popularity", "item"} <= {row["by"] for row in results["groups"]}
    cold = [row for row in results["groups"] if row["by"] == "item"]
    assert {row["variant"] for row in cold} == {"text and image alone", "declared, which was trained on them"}
    assert results["curves"][0]["x"] == [1, 2, 5, 10, 20, 50]
    assert "The declared model's difference to each" in bench(root, "results_tables.py", out, "--no-figures")
