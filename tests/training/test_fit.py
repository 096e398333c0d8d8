"""Training learns, resumes bit for bit, and stops with a clear word."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from counting import make_dataset
from tiny_training import CONFIG, log_of, one_stage, pretrained, resumed_after

from speeder_engine import Engine
from speeder_engine.checkpoint import Checkpoint
from speeder_engine.config import HeadsConfig, LivePriorConfig
from speeder_engine.data.dataset import Dataset
from speeder_engine.data.splits import leave_one_out
from speeder_engine.errors import ArtifactError, ConfigError, DataError, SpeederError, SpeederWarning
from speeder_engine.evaluation.model_scorer import ModelScorer, query_prior
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.export.engine_directory import export_engine
from speeder_engine.models.families import FAMILIES
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.runs import offsets_of
from speeder_engine.training import fit
from speeder_engine.training import gradient as gradient_module
from speeder_engine.training.config import MOST_SEED, Stage, TrainingConfig
from speeder_engine.training.features import read_images
from speeder_engine.training.fit import train
from speeder_engine.training.incremental import recipe_to_continue
from speeder_engine.training.weights import Weights


def weights(checkpoint):
    return {name: value.clone() for name, value in checkpoint.model.state_dict().items()}


@pytest.fixture(scope="module")
def finished(split, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return train(split, CONFIG, folder / "c"), folder


def test_it_learns_the_rule(split, finished):
    checkpoint, folder = finished
    scorer = ModelScorer(
        checkpoint.model, checkpoint.item_tokens(), ConstantPrior(torch.from_numpy(checkpoint.table.prior))
    )
    report = evaluate(scorer, split.queries("test"), None, ks=(1, 10))
    assert report.metrics["hr@1"] > 0.8  # by chance 1 in 24
    log = log_of(folder / "c")
    assert [record["stage"] for record in log][:2] == ["S1", "S1"]
    assert log[-1]["loss"] < log[0]["loss"] / 2
    kept = max((record for record in log if record["stage"] == "S2"), key=lambda record: record["ndcg@10"])
    assert checkpoint.metrics == kept
    assert kept != log[-1]  # or the last epoch's would do as well
    assert Checkpoint.load(folder / "c").state is None


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(split, finished, tmp_path, stop_after):
    resumed = resumed_after(stop_after, split, CONFIG, tmp_path / "c")
    expected = weights(finished[0])
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name
    first = log_of(finished[1] / "c")
    second = log_of(tmp_path / "c")
    assert [(r["stage"], r["epoch"], r["loss"]) for r in first] == [(r["stage"], r["epoch"], r["loss"]) for r in second]


def test_a_run_stopped_behind_its_last_epoch_keeps_the_kept_ones_metrics(split, finished, tmp_path):
    resumed = resumed_after(len(log_of(finished[1] / "c")), split, CONFIG, tmp_path / "c")
    assert resumed.metrics == Checkpoint.load(tmp_path / "c").metrics
    assert resumed.metrics in log_of(tmp_path / "c")
    assert resumed.metrics["ndcg@10"] == finished[0].metrics["ndcg@10"]


def test_metrics_are_those_of_the_weights_that_are_kept(split, finished):
    checkpoint = finished[0]
    scorer = ModelScorer(checkpoint.model, checkpoint.item_tokens(), query_prior(checkpoint, split, "validation"))
    found = evaluate(scorer, split.queries("validation"), None, ks=(10,)).metrics
    assert found["ndcg@10"] == pytest.approx(checkpoint.metrics["ndcg@10"], abs=1e-6)


def test_a_finished_run_resumes_to_itself(split, finished, tmp_path):
    shutil.copytree(finished[1] / "c", tmp_path / "c")
    again = train(split, CONFIG, tmp_path / "c", resume=True)
    assert all(torch.equal(value, weights(finished[0])[name]) for name, value in weights(again).items())


@pytest.mark.parametrize("emptied", [False, True])
def test_resuming_what_has_saved_nothing_begins(split, finished, tmp_path, emptied):
    if emptied:
        (tmp_path / "c").mkdir()
    with pytest.warns(SpeederWarning, match=r"c: no epoch was saved there yet; begins from the first"):
        begun = train(split, CONFIG, tmp_path / "c", resume=True)
    assert all(torch.equal(value, weights(finished[0])[name]) for name, value in weights(begun).items())


def test_the_largest_seed_trains(split, tmp_path):
    train(split, replace(CONFIG, seed=MOST_SEED, stages=CONFIG.stages[:1]), tmp_path / "c")


def test_resuming_with_something_else_is_refused(split, finished):
    folder = finished[1] / "c"
    other = TrainingConfig.from_json({**CONFIG.to_json(), "batch_size": 17})
    with pytest.raises(ConfigError, match="trained with other settings"):
        train(split, other, folder, resume=True)
    with pytest.raises(ConfigError, match="trained on other data"):
        train(leave_one_out(make_dataset(seed=5)), CONFIG, folder, resume=True)
    later = replace(split.dataset, times=split.dataset.times + 90 * 86_400)
    users = np.arange(split.dataset.num_users)[::-1]
    for other in (leave_one_out(later), leave_one_out(reordered(split.dataset, users=users))):
        with pytest.raises(ConfigError, match="same data in another order, or with other times"):
            train(other, CONFIG, folder, resume=True)


def test_items_in_another_order_are_no_run_to_resume(split, tmp_path):
    """Fingerprints are blind to it, the checkpoint's features, tokens and counts are not."""
    items = np.arange(split.dataset.num_items)[::-1].copy()
    moved = leave_one_out(reordered(split.dataset, items=items))
    assert moved.dataset.fingerprint() == split.dataset.fingerprint()
    train(split, one_stage(1), tmp_path / "c")
    with pytest.raises(ConfigError, match="same data in another order"):
        train(moved, one_stage(1), tmp_path / "c", resume=True)


def reordered(dataset, items=None, users=None):
    """The same data with its rows of items or users in another order."""
    if items is not None:
        place = np.argsort(items).astype(np.int32)
        return replace(dataset, items=dataset.items.take(items), rows=place[dataset.rows])
    events = np.concatenate([np.arange(dataset.offsets[user], dataset.offsets[user + 1]) for user in users])
    names = tuple(dataset.user_ids[user] for user in users)
    offsets = offsets_of(dataset.lengths[users])
    return replace(dataset, user_ids=names, offsets=offsets, rows=dataset.rows[events], times=dataset.times[events])


def test_one_item_is_nothing_to_learn(split, tmp_path):
    taken, times = np.zeros(4, np.int32), np.arange(4)
    one = Dataset("one", split.dataset.items.take(np.array([0])), ("u",), offsets_of(np.array([4])), taken, times)
    with pytest.raises(DataError, match="there is one item, and nothing to tell it from; add others"):
        train(leave_one_out(one), CONFIG, tmp_path / "c")


def test_two_training_events_of_a_user_are_the_least(split, tmp_path):
    taken, times = np.tile(np.arange(3, dtype=np.int32), 5), np.arange(15)
    short = Dataset("short", split.dataset.items, tuple("abcde"), offsets_of(np.full(5, 3)), taken, times)
    with pytest.raises(DataError, match="last two interactions are held out, and nobody has two more to learn from"):
        train(leave_one_out(short), one_stage(1), tmp_path / "c")


def test_settings_that_the_catalogue_forbids_are_refused_before_features_are_made(split, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "make_features", lambda *_: pytest.fail("features were made"))
    with pytest.raises(ConfigError, match="label_smoothing needs a softmax over all 24 items"):
        train(split, one_stage(1, label_smoothing=0.1, sampled_items=5), tmp_path / "c")
    untimed = leave_one_out(replace(split.dataset, times=None))
    with pytest.raises(DataError, match="live prior: the interactions have no times"):
        train(untimed, one_stage(1, live_prior=LivePriorConfig()), tmp_path / "c")


def test_a_step_without_a_title_does_not_end_a_run_of_titles_alone(split, tmp_path):
    titled = ("Title", *[""] * (len(split.dataset.items) - 1))
    few = leave_one_out(replace(split.dataset, items=replace(split.dataset.items, titles=titled)))
    heads = HeadsConfig(retrieve=False, rank=False, title=True)
    weights = {"retrieve_weight": 0, "rank_weight": 0, "order_weight": 0, "title_weight": 1}
    train(few, one_stage(1, heads=heads, batch_size=1, **weights), tmp_path / "c")
    assert log_of(tmp_path / "c")[0]["title_probability"] > 0


def test_a_modality_that_no_item_has_is_left_out(split, tmp_path):
    stages = (
        *CONFIG.stages[:1],
        Stage("S2", ("image",), 1, 1e-3),
        Stage("S3", ("text", "image"), 1, 1e-3, 0.5),
        Stage("S4", ("image", "text"), 0, 1e-3),
    )
    config = TrainingConfig.from_json({**CONFIG.to_json(), "stages": [vars(stage) for stage in stages]})
    with pytest.warns(SpeederWarning, match="no item has image features; trained without"):
        checkpoint = train(split, config, tmp_path / "c")
    assert checkpoint.model.compressor.modalities == ("text",)
    assert recipe_to_continue(checkpoint).stages == (replace(stages[2], ramp=0.0),)  # S4 was never trained
    # nothing is brought in where images are missing: a text that was in stays in
    assert [(stage.name, stage.modalities, stage.ramp) for stage in config.stages_with({"text"})] == [
        ("S1", ("text",), 0.0),
        ("S3", ("text",), 0.0),
        ("S4", ("text",), 0.0),
    ]
    assert config.stages_with({"text", "image"})[2].ramp == 0.0  # S2 has brought images in


def test_a_loss_that_is_not_finite_stops_with_its_place(split, tmp_path, monkeypatch):
    real = gradient_module.compute_losses

    def poisoned(model, tokens, *given):
        tokens = tokens + (float("nan") if np.random.default_rng(0) and model.training else 0.0)
        return real(model, tokens, *given)

    monkeypatch.setattr(gradient_module, "compute_losses", poisoned)
    with pytest.raises(SpeederError, match=r"stage S1, step 0: the retrieve loss is not finite; lower"):
        train(split, CONFIG, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_only_the_popular_is_known_without_features(split):
    """The prior is made of training events alone."""
    from speeder_engine.training.fit import popularity_prior

    prior = popularity_prior(split.train, 24)
    counts = np.zeros(24)
    for user in range(split.train.num_users):
        for row in split.train.history(user):
            counts[row] += 1
    np.testing.assert_array_equal(np.argsort(-prior, kind="stable"), np.argsort(-counts, kind="stable"))
    assert abs(prior.mean()) < 1e-6 and abs(prior.std() - 1) < 1e-5


def test_a_folder_of_somebody_elses_is_refused_before_anything_is_done(split, tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="is not empty and no checkpoint"):
        train(split, CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_images_that_cannot_be_unpacked_are_counted_and_missing():
    dataset = make_dataset()

    class Damaged:
        def __contains__(self, item_id):
            return True

        def read(self, item_id):
            if item_id in ("003", "007"):
                raise DataError(f"x.zip: {item_id}.jpg can't be unpacked")
            return b"bytes"

    damaged = replace(dataset, items=replace(dataset.items, images=Damaged()))
    with pytest.warns(SpeederWarning, match=r"2 of 24 images can't be read; the first: x.zip: 003.jpg"):
        images = read_images(damaged)
    assert [i for i, image in enumerate(images) if image is None] == [3, 7]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_backbone_of_every_family_is_tuned_and_served(split, tmp_path, family):
    # yarn also scales the rotary cos and sin: the engine directory must say so
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    config = pretrained(family, tmp_path / "base", **({"rope_parameters": yarn} if family == "mistral" else {}))
    checkpoint = train(split, replace(config, batch_size=64, validation_users=20), tmp_path / "c")
    tuned = [p for name, p in checkpoint.model.named_parameters() if "lora_B" in name]
    assert tuned and all(p.abs().max() > 0 for p in tuned)
    checkpoint.model.eval()
    scorer = ModelScorer(
        checkpoint.model, checkpoint.item_tokens(), ConstantPrior(torch.from_numpy(checkpoint.table.prior))
    )
    histories = [np.array(rows, np.int32) for rows in ([], [3], [5, 7, 9], range(15))]
    with torch.no_grad():
        expected = scorer.user_vectors(histories).numpy()
    export_engine(tmp_path / "c", tmp_path / "e")
    engine = Engine.load(tmp_path / "e", dtype="float32", kv_budget="1MiB")
    for rows, vector in zip(histories, expected, strict=True):
        np.testing.assert_allclose(engine.user_vector([f"{row:03d}" for row in rows]), vector, rtol=1e-4, atol=1e-5)


def test_settings_made_in_python_are_checked_before_training(split, tmp_path):
    with pytest.raises(ConfigError, match="max_grad_norm: expected a finite number, such as 1e6, got inf"):
        train(split, replace(CONFIG, max_grad_norm=float("inf")), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_backbone_that_cannot_be_served_is_refused_before_training(split, tmp_path):
    short = pretrained("mistral", tmp_path / "base", sliding_window=8)
    with pytest.raises(ConfigError, match="beyond 8 its attention window slides"):
        train(split, short, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_resumed_run_still_trains_its_adapters(split, tmp_path):
    config = pretrained("llama", tmp_path / "base")
    config = replace(config, stages=(Stage("S1", ("text",), 2, 5e-3),), validation_users=20, checkpoint_layers=True)
    whole = train(split, config, tmp_path / "whole")
    resumed = resumed_after(1, split, config, tmp_path / "c")
    adapters = {name: value for name, value in weights(resumed).items() if "lora_" in name}
    assert adapters and all(torch.equal(value, weights(whole)[name]) for name, value in adapters.items())


def test_validation_looks_where_the_model_is_trained(split, tmp_path, monkeypatch):
    """Its prior lies beside the tokens, wherever that is."""
    seen = []

    def stop(*args):
        raise KeyboardInterrupt

    def note(checkpoint, split, part):
        seen.append((part, checkpoint.model.prompts.weight.device.type))

    monkeypatch.setattr(fit, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(fit, "query_prior", note)
    monkeypatch.setattr(fit, "Trainer", stop)
    with pytest.raises(KeyboardInterrupt):
        train(split, CONFIG, tmp_path / "c")
    assert seen == [("validation", "meta")]


def test_item_tokens_are_made_where_the_model_is(finished):
    checkpoint = finished[0]
    elsewhere = replace(checkpoint, model=copy.deepcopy(checkpoint.model).to("meta"))
    assert elsewhere.item_tokens().device.type == "meta"
    assert elsewhere.item_tokens().shape == checkpoint.item_tokens().shape


def test_weights_that_were_read_are_put_where_they_are_trained():
    trained = Weights({"a": torch.nn.Linear(2, 3, device="meta")})
    placed = trained.placed({"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3)})
    assert {name: (value.device.type, value.shape) for name, value in placed.items()} == {
        "a.weight": ("meta", (3, 2)),
        "a.bias": ("meta", (3,)),
    }
