"""A trained model goes on over a grown data set: better than from scratch from the first moment, new items learned."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import CONFIG, log_of

from speeder_engine.checkpoint import Checkpoint
from speeder_engine.config import FollowersConfig
from speeder_engine.data.dataset import Dataset
from speeder_engine.data.items import Items
from speeder_engine.data.splits import leave_one_out
from speeder_engine.encoders.features import Features
from speeder_engine.encoders.neighbours import fold_in
from speeder_engine.errors import ConfigError, SpeederWarning
from speeder_engine.evaluation.model_scorer import ModelScorer
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.runs import offsets_of
from speeder_engine.training.features import make_features
from speeder_engine.training.fit import new_checkpoint, train
from speeder_engine.training.incremental import carried, fit_new_items, grown_model, recipe_to_continue
from speeder_engine.training.language import make_language
from speeder_engine.training.overrides import override

DAY = 86_400
OLD, GROWN = 24, 32
RECIPE = replace(
    CONFIG, calendar_days=30.0, collaborative=replace(CONFIG.collaborative, dim=8, epochs=2, tune=True), averaging=0.5
)


def counting(num_items, num_users, days, seed=0, unseen=0):
    """Item i is followed by item i + 1; ids run backwards from GROWN, so that old items move to other rows.

    The last `unseen` items have no event.
    """
    rng = np.random.default_rng(seed)
    taken = num_items - unseen
    lengths = rng.integers(6, 14, num_users)
    histories = [(rng.integers(taken) + np.arange(length)) % taken for length in lengths]
    order = np.arange(num_items)[::-1] if num_items == GROWN else np.arange(num_items)
    row_of = np.argsort(order)
    text = Features(np.eye(GROWN, dtype=np.float32)[order], np.ones(num_items, bool))
    ids = tuple(f"{i:03d}" for i in order)
    items = Items(ids, ids, ids, None, {"text": text})
    rows = row_of[np.concatenate(histories)].astype(np.int32)
    times = np.sort(rng.integers(0, days * DAY, len(rows)))
    users = tuple(f"u{u}" for u in range(num_users))
    return leave_one_out(Dataset("counting", items, users, offsets_of(lengths), rows, times))


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old") / "c"
    return train(counting(OLD, 120, days=100), RECIPE, folder), folder


def test_it_starts_where_the_old_one_stopped_and_learns_new_items(old, tmp_path):
    checkpoint, folder = old
    split = counting(GROWN, 200, days=200, seed=1, unseen=2)
    config = recipe_to_continue(checkpoint)
    assert [(s.name, s.epochs, s.ramp) for s in config.stages] == [("S2", 1, 0.0)]
    config = replace(config, stages=(replace(config.stages[0], epochs=3),))
    with pytest.warns(SpeederWarning, match="2 of 32 items have no training event"):
        grown = train(split, config, tmp_path / "new", start_from=Checkpoint.load(folder))
    log = log_of(tmp_path / "new")
    assert [record["epoch"] for record in log] == [0, 1, 2, 3]
    short = replace(config, stages=(replace(config.stages[0], epochs=1),))
    with pytest.warns(SpeederWarning, match="2 of 32 items have no training event"):
        scratch = train(split, short, tmp_path / "scratch")
    assert log[0]["ndcg@10"] > scratch.metrics["ndcg@10"]  # untrained here, after an epoch there
    torch.manual_seed(0)
    fresh = new_checkpoint(
        split, config, make_language(split, config), make_features(split, config, tmp_path / "cache")
    )
    scorer = ModelScorer(fresh.model, fresh.item_tokens(), ConstantPrior(torch.from_numpy(fresh.table.prior)))
    untrained = evaluate(scorer, split.queries("validation"), None, ks=(10,)).metrics["ndcg@10"]
    assert log[0]["ndcg@10"] > 3 * untrained
    assert max(record["ndcg@10"] for record in log[1:]) > log[0]["ndcg@10"]

    assert grown.table.item_ids == split.dataset.item_ids and grown.state is None
    tokens = Checkpoint.load(tmp_path / "new").item_tokens()
    scorer = ModelScorer(grown.model.eval(), tokens, ConstantPrior(torch.from_numpy(grown.table.prior)))
    queries = split.queries("test")
    ranks = evaluate(scorer, queries, None, ks=(10,)).ranks
    new = np.array([int(split.dataset.item_ids[row]) >= OLD for row in queries.targets])
    assert new.sum() > 20 and (ranks[new] <= 3).mean() > 0.6  # by chance .1
    collaborative = grown.features["collaborative"]
    missing = {split.dataset.item_ids[row] for row in np.flatnonzero(~collaborative.present)}
    assert missing == {"030", "031"}  # no event yet


def test_who_follows_whom_is_counted_anew(tmp_path):
    split, grown_split = counting(OLD, 60, days=100), counting(GROWN, 90, days=200, seed=1)
    recipe = replace(RECIPE, followers=FollowersConfig(window=1, last=1, keep=3), averaging=0.0)
    train(split, recipe, tmp_path / "old")
    still = recipe_to_continue(Checkpoint.load(tmp_path / "old"))
    still = replace(still, stages=(replace(still.stages[0], epochs=0),))
    grown = train(grown_split, still, tmp_path / "new", start_from=Checkpoint.load(tmp_path / "old"))
    again = Checkpoint.load(tmp_path / "new").model
    assert again.config.followers.num_items == GROWN
    torch.testing.assert_close(again.followers.weights, grown.model.followers.weights)
    row_of = {item_id: row for row, item_id in enumerate(grown.table.item_ids)}
    following = again.followers.scorer().following(np.array([row_of["027"]], np.int32))
    assert following.rows.tolist() == [row_of["028"]]  # an item that the old model didn't know
    with pytest.raises(ConfigError, match="another followers"):
        train(
            grown_split, replace(still, followers=None), tmp_path / "no", start_from=Checkpoint.load(tmp_path / "old")
        )


def test_untrained_it_is_the_old_model_over_more_items(old, tmp_path):
    """Tokens by id, position prompts and heads are the old ones; later times read as the last bucket did."""
    checkpoint, folder = old
    split = counting(GROWN, 60, days=200, seed=1)
    still = recipe_to_continue(checkpoint)
    still = replace(still, stages=(replace(still.stages[0], epochs=0),))
    grown = train(split, still, tmp_path / "new", start_from=Checkpoint.load(folder))
    before, after = checkpoint.model.state_dict(), grown.model.state_dict()
    assert len(after["times.weight"]) > len(before["times.weight"])
    assert torch.equal(after["times.weight"][: len(before["times.weight"])], before["times.weight"])
    assert torch.equal(after["times.weight"][-1], before["times.weight"][-1])
    for name in set(before) - {"times.weight"}:
        assert torch.equal(after[name], before[name]), name
    rows = [grown.table.item_ids.index(item_id) for item_id in checkpoint.table.item_ids]
    torch.testing.assert_close(grown.item_tokens()[rows], checkpoint.item_tokens(), atol=1e-5, rtol=1e-5)
    assert len(grown.table) == GROWN and grown.table.prior.std() == pytest.approx(1, abs=1e-3)


def test_times_before_the_calendar_are_counted_in_a_warning(old):
    checkpoint, folder = old
    split, calendar = counting(GROWN, 60, days=200), checkpoint.model.config.prompt.calendar
    times = split.train.times.copy()
    times[:7], times[7:] = calendar.first_second - 1, calendar.first_second
    earlier = replace(split, train=replace(split.train, times=times))
    with pytest.warns(SpeederWarning, match=r"7 of [\d,]+ interactions are older than the checkpoint's calendar"):
        grown_model(Checkpoint.load(folder).model, earlier)


def test_known_vectors_stand_still_and_new_ones_are_fitted(old):
    checkpoint, _ = old
    split = counting(GROWN, 120, days=200, seed=1, unseen=2)
    known = carried(checkpoint.features["collaborative"], checkpoint.table.item_ids, split.dataset.item_ids)
    assert known.present.sum() == OLD
    fitted = fit_new_items(split, known, RECIPE)
    np.testing.assert_array_equal(fitted.values[known.present], known.values[known.present])
    odd = fit_new_items(split, Features(np.ascontiguousarray(known.values[:, :7]), known.present), RECIPE)
    assert odd.dim == 7 and odd.present.sum() == GROWN - 2
    assert fitted.present.sum() == GROWN - 2 and np.abs(fitted.values[fitted.present]).max(axis=1).min() > 0
    assert (
        fit_new_items(counting(OLD, 60, days=50), checkpoint.features["collaborative"], RECIPE)
        is (checkpoint.features["collaborative"])
    )


def test_new_items_get_factors_of_who_follows_whom(tmp_path):
    """What is learned beside factors is as large as that of known items, and factors are those of the fold."""
    collaborative = replace(RECIPE.collaborative, neighbours=4, epochs=4)
    recipe = replace(RECIPE, collaborative=collaborative)
    old, grown = counting(OLD, 120, days=100), counting(GROWN, 200, days=200, seed=1)
    features = make_features(old, recipe, tmp_path / "cache").features["collaborative"]
    known = carried(features, old.dataset.item_ids, grown.dataset.item_ids)
    found = fit_new_items(grown, known, recipe)
    np.testing.assert_array_equal(found.values[known.present], known.values[known.present])
    assert found.dim == 8 + 2 * 4 and found.present.all()
    new, factors = ~known.present, np.ascontiguousarray(known.values[:, 8:])
    folded = fold_in(grown.train.offsets, grown.train.rows, Features(factors, known.present), new)
    np.testing.assert_array_equal(found.values[new, 8:], folded.values[new])
    learned = np.linalg.norm(found.values[:, :8], axis=1)
    assert 0.4 < learned[new].mean() / learned[known.present].mean() < 2.5
    own = replace(recipe, collaborative=replace(collaborative, neighbours=3))  # not the factors of this recipe
    other = fit_new_items(grown, known, own)
    assert other.present.all() and not np.allclose(other.values[new, 8:], folded.values[new])


def test_a_small_catalogue_has_as_many_factors_as_it_can(tmp_path):
    recipe = replace(RECIPE, collaborative=replace(RECIPE.collaborative, neighbours=64))
    with pytest.warns(SpeederWarning, match=rf"neighbours: {OLD} items have no more than {OLD} factors, not 64"):
        made = make_features(counting(OLD, 60, days=100), recipe, tmp_path / "cache").features["collaborative"]
    assert made.dim == 8 + 2 * OLD


def test_another_model_is_refused(old, tmp_path):
    checkpoint, folder = old
    split = counting(GROWN, 60, days=200)

    def go_on(*changes, data=split):
        config = override(recipe_to_continue(checkpoint), list(changes))
        train(data, config, tmp_path / "new", start_from=Checkpoint.load(folder))

    for change in ("window=12", "question=Next?", "text_encoder=fitted", "image_encoder=fitted", "collaborative.dim=4"):
        name = change.split("=")[0]
        with pytest.raises(ConfigError, match=f"--start-from: the checkpoint was made with another {name}; keep its"):
            go_on(change)
    wide = {"text": Features(np.ones((GROWN, 40), np.float32), np.ones(GROWN, bool))}
    wider = replace(split, dataset=replace(split.dataset, items=replace(split.dataset.items, vectors=wide)))
    with pytest.raises(ConfigError, match="text vectors of 40 and 32 numbers, the data's and the checkpoint's"):
        go_on(data=wider)
