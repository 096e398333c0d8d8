from dataclasses import replace

import numpy as np
import pytest
import torch

from speeder_engine.encoders.sasrec import SASRecConfig
from speeder_engine.encoders.sequence_fit import ndcg_at_10
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.baselines.gru4rec import GRU4RecConfig
from speeder_engine.evaluation.baselines.hstu import HSTUConfig
from speeder_engine.evaluation.baselines.sequence import SEQUENCE_MODELS, SequenceBaseline
from speeder_engine.evaluation.metrics import mask_history, ndcg, target_ranks
from speeder_engine.evaluation.protocols import evaluate

NUM_ITEMS, WINDOW = 24, 8
SHARED = {"dim": 16, "num_layers": 1, "window": WINDOW, "dropout": 0.1, "epochs": 10, "tokens_per_batch": 256}
SMALL = {
    "sasrec": SASRecConfig(**SHARED, learning_rate=1e-2),
    "gru4rec": GRU4RecConfig(**SHARED, learning_rate=1e-2, hidden_size=24),
    "hstu": HSTUConfig(**SHARED, learning_rate=1e-2),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def split(make_split):
    """200 histories round the circle of all items, each from a place of its own: x is followed by x + 1."""
    rng = np.random.default_rng(0)
    histories = [(rng.integers(NUM_ITEMS) + np.arange(rng.integers(4, 18))) % NUM_ITEMS for _ in range(200)]
    return make_split(histories, num_items=NUM_ITEMS)


@pytest.fixture(scope="module", params=SMALL)
def fitted(request, split):
    return SequenceBaseline.fit(request.param, split, SMALL[request.param])


def test_learns_what_comes_next(fitted, split):
    assert evaluate(fitted, split.queries("test"), None).metrics["hr@1"] > 0.9


def test_equal_seeds_give_equal_scores_whatever_was_drawn_before(fitted, split):
    queries = split.queries("test").slice(0, 20)
    short = replace(SMALL[fitted.name], epochs=2)
    first = SequenceBaseline.fit(fitted.name, split, short).scores(queries)
    torch.manual_seed(99)
    np.testing.assert_array_equal(SequenceBaseline.fit(fitted.name, split, short).scores(queries), first)
    other = SequenceBaseline.fit(fitted.name, split, replace(short, seed=1)).scores(queries)
    assert not np.allclose(other, first)


def test_no_position_sees_a_later_one(fitted):
    rows = torch.arange(WINDOW)[None]
    changed = rows.clone()
    changed[0, 5:] = 20
    with torch.inference_mode():
        before, after = fitted.model(rows)[0], fitted.model(changed)[0]
    torch.testing.assert_close(before[:5], after[:5], atol=1e-6, rtol=0)
    assert not torch.allclose(before[5], after[5])


def test_earlier_items_are_seen(fitted):
    with torch.inference_mode():
        last = fitted.model(torch.tensor([[3, 9, 5], [9, 3, 5], [3, 1, 5]]))[:, -1]
    assert not torch.allclose(last[0], last[2])
    assert not torch.allclose(last[0], last[1])  # nor is their order lost


def test_histories_of_any_length_whatever_their_company(fitted, make_queries):
    histories = [[], [3], list(range(20)), [4, 5, 6]]
    together = fitted.scores(make_queries(histories, [0] * 4))
    assert together.shape == (4, NUM_ITEMS) and together.dtype == np.float32
    for history, line in zip(histories, together, strict=True):
        np.testing.assert_allclose(fitted.scores(make_queries([history], [0]))[0], line, atol=1e-5)
    recent = fitted.scores(make_queries([list(range(20 - WINDOW, 20))], [0]))[0]
    np.testing.assert_allclose(recent, together[2], atol=1e-5)
    np.testing.assert_array_equal(together[0], fitted.model.bias.detach().numpy())


def count(name, num_items, config):
    kind, _ = SEQUENCE_MODELS[name]
    return sum(parameter.numel() for parameter in kind(num_items, config).parameters())


def test_numbers_of_parameters():
    """By hand: embeddings and biases of items, then the layers."""
    items, d, window = 2394, 64, 50
    embeddings, norm = items * (d + 1), 2 * d
    layer = d * 3 * d + 3 * d + d * d + d + d * 4 * d + 4 * d + 4 * d * d + d + 2 * norm
    # the reference's SASRec has 256,576: a row for padding and no biases of items
    assert count("sasrec", items, SASRecConfig()) == embeddings + window * d + 2 * layer + norm
    assert embeddings + window * d + 2 * layer + norm - items + d == 256_576
    hidden = 128
    gru = 3 * hidden * (d + hidden + 2)
    assert count("gru4rec", items, GRU4RecConfig()) == embeddings + gru + hidden * d + d + norm
    hstu = d * 4 * d + 4 * d + d * d + d + 2 * norm + 2 * window
    assert count("hstu", items, HSTUConfig()) == embeddings + 2 * hstu + norm


def test_what_can_not_be_fitted_is_refused(split, make_split):
    with pytest.raises(ConfigError, match="no sequence model 'bert'; choose sasrec"):
        SequenceBaseline.fit("bert", split)
    with pytest.raises(ConfigError, match="takes a HSTUConfig, not a SASRecConfig"):
        SequenceBaseline.fit("hstu", split, SASRecConfig())
    with pytest.raises(DataError, match="sasrec: no validation queries"):
        SequenceBaseline.fit("sasrec", make_split([[1, 2], [3, 4]]))
    with pytest.raises(DataError, match="nothing to learn from"):
        SequenceBaseline.fit("sasrec", make_split([[1, 2, 3], [3, 4, 5]]))


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (GRU4RecConfig, {"hidden_size": 0}, "GRU4RecConfig.hidden_size must be at least 1"),
        (HSTUConfig, {"dim": 9}, "HSTUConfig.dim 9 must be a multiple"),
        (HSTUConfig, {"dropout": 1.0}, "HSTUConfig.dropout"),
        (SASRecConfig, {"num_heads": 0}, "SASRecConfig.num_heads must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(kind, change, says):
    with pytest.raises(ConfigError, match=says):
        kind(**change)


def test_epochs_are_judged_as_answers_are(split, make_queries):
    """By the metrics' own rule for ties; what has diverged is worth nothing."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 30, 50).astype(np.int32)
    queries = make_queries([rng.choice(30, 4).tolist() for _ in range(50)], targets)
    asked = (queries.offsets, queries.rows, queries.targets)
    coarse = rng.integers(0, 4, (50, 30)).astype(np.float32)
    masked = mask_history(coarse, queries.offsets, queries.rows, targets)
    found = ndcg_at_10(lambda users: coarse[users.start : users.stop].copy(), asked)
    assert found == pytest.approx(ndcg(target_ranks(masked, targets), 10).mean())
    assert ndcg_at_10(lambda users: np.full((len(users), 30), np.nan, np.float32), asked) == 0
    everywhere_alike = ndcg_at_10(lambda users: np.zeros((len(users), 30), np.float32), asked)
    assert 0 < everywhere_alike < 0.5
