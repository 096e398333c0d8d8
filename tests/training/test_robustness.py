"""Data as it comes: training and evaluation run, and say once and with a count what they do without."""

import warnings
from dataclasses import replace
from io import BytesIO

import numpy as np
import torch
from counting import make_dataset
from PIL import Image
from tiny_training import CONFIG as BASE
from tiny_training import one_stage

from speeder_engine.data.splits import leave_one_out
from speeder_engine.encoders.features import Features
from speeder_engine.errors import SpeederWarning
from speeder_engine.evaluation.model_scorer import ModelScorer
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.runs import offsets_of
from speeder_engine.training.config import Stage
from speeder_engine.training.fit import train

CONFIG = replace(BASE, stages=(Stage("S2", ("text", "collaborative"), 1, 5e-3),))


def with_items(dataset, **changes):
    return replace(dataset, items=replace(dataset.items, **changes))


def missing(features, rows):
    present = features.present.copy()
    present[rows] = False
    return Features(np.where(present[:, None], features.values, 0).astype(np.float32), present)


def run(dataset, folder, config=CONFIG):
    """The test metrics, and every SpeederWarning on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SpeederWarning)
        split = leave_one_out(dataset)
        checkpoint = train(split, config, folder)
        prior = ConstantPrior(torch.from_numpy(checkpoint.table.prior))
        scorer = ModelScorer(checkpoint.model.eval(), checkpoint.item_tokens(), prior)
        metrics = evaluate(scorer, split.queries("test"), None, ks=(10,)).metrics
    assert np.isfinite(metrics["ndcg@10"]) and metrics["hr@10"] > 0.3  # by chance 10 of 24
    said = [str(each.message) for each in caught if issubclass(each.category, SpeederWarning)]
    return checkpoint, said


def test_a_modality_missing_for_some_items(tmp_path):
    dataset = make_dataset()
    vectors = {**dataset.items.vectors, "text": missing(dataset.items.vectors["text"], [2, 3, 9])}
    _, said = run(with_items(dataset, vectors=vectors), tmp_path / "c")
    assert said == ["counting: 3 of 24 items have no text features: '002', '003', '009'"]


def test_a_modality_missing_for_all_items(tmp_path):
    dataset = make_dataset()
    vectors = {**dataset.items.vectors, "text": missing(dataset.items.vectors["text"], range(24))}
    checkpoint, said = run(with_items(dataset, vectors=vectors), tmp_path / "c")
    assert said == ["counting: no item has text features; trained without"]
    assert checkpoint.model.compressor.modalities == ("collaborative",)


def test_all_modalities_missing_for_an_item(tmp_path):
    dataset = make_dataset()
    vectors = {name: missing(each, [4]) for name, each in dataset.items.vectors.items()}
    checkpoint, said = run(with_items(dataset, vectors=vectors), tmp_path / "c")
    assert said == ["counting: 1 of 24 items have no text features: '004'"]
    assert bool(torch.isfinite(checkpoint.item_tokens()).all())


def test_users_with_one_interaction(tmp_path):
    dataset = make_dataset()
    lengths = np.append(np.diff(dataset.offsets), [1, 1])
    dataset = replace(
        dataset,
        user_ids=(*dataset.user_ids, "once", "once more"),
        offsets=offsets_of(lengths),
        rows=np.append(dataset.rows, np.array([3, 4], np.int32)),
        times=np.append(dataset.times, [10**6, 10**6 + 1]),
    )
    _, said = run(dataset, tmp_path / "c")
    assert said == [
        "counting: 2 users with fewer than 3 interactions are trained on but not evaluated: 'once', 'once more'",
        "counting: 2 users have one training event, which counts as popularity and teaches nothing else: 'once', "
        "'once more'",
    ]


def test_items_never_seen(tmp_path):
    """Without events an item has no collaborative vector, and can be recommended all the same."""
    dataset = make_dataset()
    text = Features(np.eye(26, 24, dtype=np.float32) + 0.1, np.ones(26, bool))
    ids = (*dataset.items.item_ids, "024", "025")
    items = replace(dataset.items, item_ids=ids, titles=ids, texts=ids, vectors={"text": text})
    config = replace(CONFIG, collaborative=replace(CONFIG.collaborative, dim=8, epochs=1))
    checkpoint, said = run(replace(dataset, items=items), tmp_path / "c", config)
    message = "2 of 26 items have no training event and are known by their content alone: '024', '025'"
    assert said == [f"counting: {message}"]
    assert np.flatnonzero(~checkpoint.features["collaborative"].present).tolist() == [24, 25]
    assert bool(torch.isfinite(checkpoint.item_tokens()).all())


class Pictures:
    """Every tenth file is cut short."""

    def __contains__(self, item_id):
        return True

    def read(self, item_id):
        number = int(item_id)
        buffer = BytesIO()
        Image.new("RGB", (24, 24), (10 * number, 255 - 10 * number, 40)).save(buffer, "PNG")
        return buffer.getvalue()[: 30 if number % 10 == 0 else None]


def test_ten_percent_of_the_images_are_corrupt(tmp_path):
    dataset = with_items(make_dataset(), images=Pictures())
    config = replace(CONFIG, stages=(Stage("S3", ("text", "image"), 1, 5e-3),), image_encoder="fitted")
    checkpoint, said = run(dataset, tmp_path / "c", config)
    assert checkpoint.features["image"].present.sum() == 21
    decoded = [message for message in said if "can't be decoded" in message]
    assert decoded == ["3 of 24 images can't be decoded and count as missing: '000', '010', '020'"]
    assert [message for message in said if message not in decoded] == [
        "counting: 3 of 24 items have no image features: '000', '010', '020'"
    ]


def test_duplicate_titles(tmp_path):
    titles = ("Emma", "Emma", "Emma", "Ran", "Ran", *(f"Title {i}" for i in range(5, 24)))
    _, said = run(with_items(make_dataset(), titles=titles), tmp_path / "c")
    assert said == ["counting: 5 items share 2 titles; no title head tells them apart: 'Emma', 'Ran'"]


def test_a_history_of_two_thousand_events(tmp_path):
    dataset = make_dataset()
    lengths = np.append(np.diff(dataset.offsets), 2000)
    dataset = replace(
        dataset,
        user_ids=(*dataset.user_ids, "faithful"),
        offsets=offsets_of(lengths),
        rows=np.append(dataset.rows, (np.arange(2000) % 24).astype(np.int32)),
        times=np.append(dataset.times, 10**6 + np.arange(2000)),
    )
    checkpoint, said = run(dataset, tmp_path / "c", one_stage(epochs=1))
    assert said == []  # nothing is left out: it is trained window by window
    assert checkpoint.model.prompts.weight.shape[0] == 11
