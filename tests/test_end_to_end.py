"""The unbroken path on a slice of real data: folder -> features -> stages -> checkpoint -> engine -> ranking."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from speeder_engine import Engine, Item
from speeder_engine.checkpoint import Checkpoint
from speeder_engine.data.candidates import draw_candidates
from speeder_engine.data.dataset import Dataset, load_dataset
from speeder_engine.data.splits import leave_one_out
from speeder_engine.evaluation.baselines import BASELINES
from speeder_engine.evaluation.compare import compare
from speeder_engine.evaluation.engine_scorer import EngineScorer
from speeder_engine.evaluation.model_scorer import ModelScorer
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.export.engine_directory import export_engine
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.synthetic import write_synthetic_dataset
from speeder_engine.training.config import BackboneConfig, CollaborativeConfig, Stage, TrainingConfig
from speeder_engine.training.fit import train

CONFIG = TrainingConfig(
    instruction="Next:",
    window=30,
    window_step=10,
    backbone=BackboneConfig(vocab_size=400, hidden_size=48, num_heads=2, intermediate_size=96),
    text_encoder="fitted",
    collaborative=CollaborativeConfig(epochs=3),
    stages=(
        Stage("S1", ("text",), 1, 3e-3),
        Stage("S2", ("text", "collaborative"), 3, 3e-3, 0.3),
        Stage("S3", ("text", "collaborative", "image"), 1, 1e-3, 0.5),
    ),
    batch_size=32,
)


def run(dataset: Dataset, out):
    """Trains, exports, and holds the engine against the model it came from; returns the reports."""
    split = leave_one_out(dataset)
    train(split, CONFIG, out / "checkpoint")
    export_engine(out / "checkpoint", out / "engine")
    engine = Engine.load(out / "engine")
    checkpoint = Checkpoint.load(out / "checkpoint")
    queries = split.queries("test", split.users[:200])
    lists = draw_candidates(dataset, queries)
    model = ModelScorer(
        checkpoint.model, checkpoint.item_tokens(), ConstantPrior(torch.from_numpy(checkpoint.table.prior))
    )
    served = EngineScorer(engine, dataset.item_ids)
    first = queries.slice(0, 32)
    np.testing.assert_allclose(served.scores(first), model.scores(first), atol=1e-3)
    np.testing.assert_allclose(
        served.candidate_scores(first, lists.rows[:32]), model.candidate_scores(first, lists.rows[:32]), atol=1e-3
    )
    systems = [served, *(BASELINES[name](split) for name in ("popularity", "markov"))]
    return engine, {system.name: evaluate(system, queries, lists) for system in systems}


def check_upserts(engine, dataset, checkpoint):
    """Raw text and image through the engine's own encoders give the token that training and export gave."""
    items, exported = dataset.items, engine.item_vectors(dataset.item_ids)
    collaborative = checkpoint.features["collaborative"].values
    again = [
        Item(
            items.item_ids[row],
            text=items.texts[row],
            image=items.images.read(items.item_ids[row]),
            vectors={"collaborative": collaborative[row]},
        )
        for row in range(20)
    ]
    assert engine.upsert(again) == 0
    np.testing.assert_allclose(engine.item_vectors(dataset.item_ids), exported, atol=1e-4 * np.abs(exported).max())
    # a new item that reads and looks like a known one is recommended where that one is, without any click
    twin = Item("twin", text=items.texts[3], image=items.images.read(items.item_ids[3]))
    assert engine.upsert([twin]) == 1
    similar = engine.similar_items("twin", 30).items
    assert items.item_ids[3] in similar


def check_documents(folder):
    """The Python of README and docs/engine.md runs as it stands, one block after the other."""
    (folder / "demo").mkdir()
    (folder / "another").mkdir()
    for place in ("demo", "another"):
        shutil.copytree(folder / "engine", folder / place / "engine")
    cover = folder / "poster.jpg"
    Image.new("RGB", (40, 60), "red").save(cover)
    root = Path(__file__).resolve().parent.parent
    for name in ("README.md", "docs/engine.md"):
        blocks = re.findall(r"```python\n(.*?)```", (root / name).read_text(), flags=re.DOTALL)
        assert blocks
        script = folder / "document.py"
        script.write_text("\n".join(blocks))
        run = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True)
        assert run.returncode == 0, f"{name}: {run.stderr}"


@pytest.mark.slow
def test_made_catalogue(tmp_path):
    folder = write_synthetic_dataset(tmp_path / "data", num_users=400, num_items=150)
    engine, reports = run(load_dataset(folder), tmp_path)
    # the made catalogue has an order that popularity can't know
    assert reports["speeder"].metrics["hr@10"] > 1.5 * reports["popularity"].metrics["hr@10"]
    assert set(engine.parts.config.compressor.modalities) == {"text", "collaborative", "image"}
    compared = compare(
        [str(tmp_path / "engine"), str(tmp_path / "checkpoint"), "popularity"], folder, candidates=tmp_path / "lists"
    ).reports
    by_engine, by_checkpoint, _ = (report.metrics for report in compared)
    assert by_engine == pytest.approx(by_checkpoint, abs=0.006)  # a rounding may turn two users' ranks
    again = compare(["popularity"], folder, candidates=tmp_path / "lists").reports[0]
    assert again.metrics == compared[2].metrics
    assert json.loads((tmp_path / "engine" / "engine.json").read_text())["limits"]["num_items"] == len(engine.catalogue)
    check_upserts(engine, load_dataset(folder), Checkpoint.load(tmp_path / "checkpoint"))
    check_documents(tmp_path)


@pytest.mark.slow
def test_slice_of_real_data(shared_data, tmp_path):
    source = shared_data / "movietweetings-mm"
    folder = tmp_path / "slice"
    folder.mkdir()
    with (source / "interactions.csv").open() as file:
        lines = list(csv.reader(file))
    counts: dict[str, int] = {}
    for line in lines[1:]:
        counts[line[1]] = counts.get(line[1], 0) + 1
    popular = set(sorted(counts, key=lambda item: -counts[item])[:250])
    users = dict.fromkeys(line[0] for line in lines[1:])
    chosen = set(list(users)[:600])
    with (folder / "interactions.csv").open("w", newline="") as file:
        kept = [line for line in lines[1:] if line[0] in chosen and line[1] in popular]
        csv.writer(file).writerows([lines[0], *kept])
    (folder / "items.jsonl").symlink_to(source / "items.jsonl")
    (folder / "posters.zip").symlink_to(source / "posters.zip")
    engine, reports = run(load_dataset(folder), tmp_path)
    assert all(item_id.isdigit() and len(item_id) == 7 for item_id in engine.catalogue.item_ids)
    assert reports["speeder"].metrics["hr@10"] > reports["popularity"].metrics["hr@10"]
    assert reports["speeder"].metrics["valid_ratio"] == 1.0
