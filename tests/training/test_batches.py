"""What a batch holds: every target once an epoch, honest candidates, pairs in their true order, the same when asked
again."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_engine.data.splits import Histories
from speeder_engine.runs import offsets_of
from speeder_engine.training.batches import PAD, TrainingBatches
from speeder_engine.training.config import TrainingConfig


def make_batches(lengths, window=6, batch_size=4, num_items=50, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, num_items, sum(lengths)).astype(np.int32)
    histories = Histories(offsets_of(np.array(lengths)), rows)
    config = TrainingConfig(window=window, window_step=2, batch_size=batch_size)
    return TrainingBatches(histories, num_items, config)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 50))
def test_every_target_is_trained_once_an_epoch(lengths, window, epoch):
    batches = make_batches(lengths, window=max(window, 2))
    counted = Counter()
    for batch in batches.epoch(epoch):
        assert batch.rows.shape[1] <= max(window, 2)
        counted.update(batch.targets[batch.targets != PAD].tolist())
        for i in range(len(batch)):
            n = int(batch.lengths[i])
            # what stands in the history is what the targets said would come
            assert batch.rows[i, 1:n].tolist() == batch.targets[i, 1:n].tolist()
            assert (batch.targets[i, n + 1 :] == PAD).all()
    assert counted == Counter(batches.histories.rows.tolist())


def test_an_epoch_can_be_asked_for_again():
    batches = make_batches([5, 30, 8, 12, 3, 3])
    first, again, other = (list(batches.epoch(number)) for number in (3, 3, 4))
    for one, two in zip(first, again, strict=True):
        assert all(bool((getattr(one, name) == getattr(two, name)).all()) for name in vars(one))
    assert any(
        one.rows.shape != two.rows.shape or bool((one.rows != two.rows).any())
        for one, two in zip(first, other, strict=False)
    )


def test_candidates_are_the_next_item_and_others():
    batches = make_batches([8] * 40, num_items=9)
    negatives = Counter()
    for epoch in range(10):
        for batch in batches.epoch(epoch):
            next_items = batch.targets.gather(1, batch.cuts[:, None])[:, 0]
            trained = next_items != PAD
            assert (batch.cuts >= 1).all() and (batch.cuts <= batch.lengths).all()
            assert (batch.candidates[trained, 0] == next_items[trained]).all()
            assert (batch.candidates[trained, 1:] != next_items[trained, None]).all()
            negatives.update(batch.candidates[:, 1:].flatten().tolist())
    expected = sum(negatives.values()) / 9
    assert all(abs(negatives[item] - expected) < 0.2 * expected for item in range(9))


def test_pairs_say_truly_which_came_first():
    batches = make_batches([2, 3, 4, 6] * 30)
    earlier = total = 0
    for batch in batches.epoch(0):
        for (first, second), label, length in zip(batch.pairs, batch.first_is_earlier, batch.lengths, strict=True):
            assert 0 <= first < length and 0 <= second < length
            if length < 2:
                assert first == second
            else:
                assert first != second and bool(first < second) == bool(label)
                earlier, total = earlier + int(label), total + 1
    assert 0.3 < earlier / total < 0.7


@pytest.mark.parametrize("length", [1, 2, 7, 8, 50])
def test_short_and_long_histories(length):
    batches = make_batches([length, 5])
    assert batches.batches_per_epoch == 1 or length > 20
    assert sum(int((batch.targets != PAD).sum()) for batch in batches.epoch(0)) == 5 + (length if length > 1 else 0)
