from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from speeder_engine.encoders.collaborative import fit_collaborative
from speeder_engine.encoders.sasrec import SASRec, SASRecConfig
from speeder_engine.encoders.sequence_fit import fit_sequence_model, validated_ndcg
from speeder_engine.encoders.windows import cut_windows, draw_batches, gather, pad_right
from speeder_engine.errors import ConfigError, DataError

NUM_ITEMS = 30
SMALL = SASRecConfig(dim=16, window=8, dropout=0.1, epochs=12, tokens_per_batch=256, learning_rate=1e-2)


def pack(histories):
    offsets = np.cumsum([0, *(len(history) for history in histories)]).astype(np.int64)
    return offsets, np.concatenate(histories).astype(np.int32)


@pytest.fixture(scope="module")
def cycles():
    """300 histories round a circle of 25 items, each from a place of its own: only order tells what comes next."""
    generator = np.random.default_rng(0)
    histories = []
    for _ in range(300):
        start = generator.integers(25)
        histories.append((start + np.arange(generator.integers(2, 20))) % 25)
    return histories


@pytest.fixture(scope="module")
def model(cycles):
    return fit_sequence_model(SASRec, SMALL, *pack(cycles), NUM_ITEMS)


def test_learns_which_item_comes_next(model):
    histories = [np.array([item, (item + 1) % 25]) for item in range(25)]
    assert (model.scores(histories).argmax(1).numpy() == (np.arange(25) + 2) % 25).mean() > 0.95


def test_items_without_an_event_are_not_present(cycles, model):
    features = fit_collaborative(*pack(cycles), NUM_ITEMS, SMALL)
    np.testing.assert_array_equal(features.values[:25], model.items.weight.detach().numpy()[:25])
    assert features.values.shape == (NUM_ITEMS, 16)
    np.testing.assert_array_equal(features.present, np.arange(NUM_ITEMS) < 25)


def test_equal_seeds_give_equal_vectors_whatever_was_drawn_before(cycles, model):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = fit_sequence_model(SASRec, SMALL, *pack(cycles), NUM_ITEMS)
    assert torch.equal(again.items.weight, model.items.weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scores_do_not_depend_on_company_or_on_what_left_the_window(model):
    histories = [np.array([3, 4]), np.arange(20), np.array([], np.int64), np.array([7])]
    together = model.scores(histories)
    for history, line in zip(histories, together, strict=True):
        torch.testing.assert_close(model.scores([history])[0], line, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.scores([np.arange(12, 20)])[0], together[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[2], model.bias.detach())


def test_no_position_sees_a_later_one(model):
    rows = torch.arange(8)[None]
    changed = rows.clone()
    changed[0, 5:] = 20
    with torch.inference_mode():
        before, after = model(rows)[0], model(changed)[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert not torch.allclose(before[5], after[5])


def test_every_step_is_trained_exactly_once():
    histories = [np.arange(100 * u, 100 * u + n) for u, n in enumerate([1, 2, 9, 10, 17, 30])]
    offsets, rows = pack(histories)
    starts, lengths = cut_windows(offsets, 8)
    steps = []
    for batch in draw_batches(lengths, 20, np.random.default_rng(0)):
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= 20
        inputs, real, targets = gather(
            torch.from_numpy(rows), torch.from_numpy(starts[batch]), torch.from_numpy(lengths[batch])
        )
        assert inputs.shape[1] <= 8
        steps += list(zip(inputs[real].tolist(), targets.tolist(), strict=True))
    expected = [(int(a), int(b)) for history in histories for a, b in pairwise(history)]
    assert sorted(steps) == sorted(expected)


def test_pad_right():
    padded, lengths = pad_right([np.array([5]), np.array([7, 8, 9])])
    assert padded.tolist() == [[5, 0, 0], [7, 8, 9]] and lengths.tolist() == [1, 3]


def test_validated_ndcg_masks_the_history_and_counts_ten_places():
    """With a model that scores by its bias alone: item 29 is the best, and so on down."""
    model = SASRec(NUM_ITEMS, SMALL)
    torch.nn.init.zeros_(model.items.weight)
    model.bias.data = torch.arange(NUM_ITEMS, dtype=torch.float32)
    offsets, rows = pack([np.array([29]), np.array([29, 28]), np.array([0]), np.array([29])])
    targets = np.array([28, 26, 20, 19])  # ranks 0, 1, 9, 9
    expected = (1 + 1 / np.log2(3) + 1 / np.log2(11) + 1 / np.log2(11)) / 4
    assert validated_ndcg(model, (offsets, rows, targets)) == pytest.approx(expected)


def test_stops_early_and_keeps_the_best_epoch(cycles):
    offsets, rows = pack([history[:-1] for history in cycles])
    validation = (offsets, rows, np.array([history[-1] for history in cycles]))
    config = replace(SMALL, epochs=60, patience=2)
    best = fit_sequence_model(SASRec, config, offsets, rows, NUM_ITEMS, validation)
    short = fit_sequence_model(SASRec, replace(config, epochs=2), offsets, rows, NUM_ITEMS)
    assert validated_ndcg(best, validation) > validated_ndcg(short, validation)


@pytest.mark.parametrize(
    ("offsets", "rows", "says"),
    [
        ([0, 2], [0, 1, 2], "offsets"),
        ([0, 3, 2, 3], [0, 1, 2], "offsets"),
        ([0, 2], [0, 30], r"0\.\.29"),
        ([0, 1], [3], "two"),
    ],
)
def test_refuses_histories_that_do_not_fit(offsets, rows, says):
    with pytest.raises(DataError, match=says):
        fit_collaborative(np.array(offsets), np.array(rows), NUM_ITEMS, SMALL)


@pytest.mark.parametrize("change", [{"dim": 7}, {"dropout": 1.0}, {"epochs": 0}, {"learning_rate": 0.0}])
def test_refuses_a_config_out_of_range(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        SASRecConfig(**change)
