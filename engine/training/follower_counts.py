"""Who follows whom in training histories, counted into a model's table."""

import numpy as np

from speeder_engine.config import FollowersConfig
from speeder_engine.data.splits import Histories
from speeder_engine.encoders.pairs import count_followers
from speeder_engine.following import discounts
from speeder_engine.models.follower_table import FollowerTable


def follower_table(config: FollowersConfig, train: Histories, num_items: int) -> FollowerTable:
    """Each item's `keep` nearest followers; gamma as it begins."""
    counted = count_followers(train.offsets, train.rows, num_items, config.window, config.forward)
    events = np.bincount(train.rows, minlength=num_items)
    kept = counted.take(counted.scaled(*discounts(config, events)).largest(config.keep))
    return FollowerTable(config.sized(num_items, len(kept.rows))).fill(kept, events)
