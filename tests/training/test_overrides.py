"""Settings by dotted keys, and a clear word where they don't fit."""

import pytest

from speeder_engine.errors import ConfigError
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.overrides import override


def test_values_are_yaml_and_reach_every_depth():
    changes = ["collaborative.epochs=3", "stages.1.learning_rate=1e-3", "heads={rank: false}", "rank_weight=0"]
    changed = override(TrainingConfig(), [*changes, "text_encoder=fitted", "seed=1", "seed=7"])
    assert changed.collaborative.epochs == 3 and changed.stages[1].learning_rate == 1e-3
    assert not changed.heads.rank and changed.text_encoder == "fitted" and changed.seed == 7
    assert changed.stages[0] == TrainingConfig().stages[0]
    for text, value in (("1e-1", 0.1), ("+.5E1", 5.0), ("2.e0", 2.0), ("1.5e+1", 15.0)):
        assert override(TrainingConfig(), [f"rank_weight={text}"]).rank_weight == value
    assert override(TrainingConfig(), []) == TrainingConfig()


def test_entries_of_lists_are_set():
    stage = "{name: S9, modalities: [text], epochs: 1, learning_rate: 0.1}"
    changes = [f"stages.0={stage}", "stages.1.modalities.0=image", "followers={}", "followers.discounts.0=1"]
    changed = override(TrainingConfig(), changes[:3])
    assert changed.stages[0].name == "S9" and changed.stages[1].modalities == ("image", "collaborative")
    assert override(changed, changes[3:]).followers.discounts == (1.0, 0.3)


def test_a_section_that_is_off_is_switched_on_by_a_key_of_it():
    assert TrainingConfig().followers is None
    changed = override(TrainingConfig(), ["followers.window=5", "followers.last=2"])
    assert (changed.followers.window, changed.followers.last) == (5, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed", r"--set seed: write KEY=VALUE"),
        ("=3", r"--set =3: write KEY=VALUE"),
        ("colaborative.epochs=3", r"the recipe has no 'colaborative'; it has seed, "),
        ("collaborative.epoch=3", r"unknown keys \['epoch'\]; known are .*'epochs'"),
        ("stages.9.epochs=3", r"stages has entries 0 to 2, not '9'"),
        ("stages.²=3", r"stages has entries 0 to 2, not '²'"),
        ("stages.-1=3", r"stages has entries 0 to 2, not '-1'"),
        ("seed=2020-13-45", r"--set seed=2020-13-45: no valid YAML"),
        ("seed.x=3", r"seed is 0 and has no keys"),
        ("heads={rank: true, rank: false}", r"no valid YAML: 'rank' stands there a second time"),
        ("followers.windo=3", r"FollowersConfig: unknown keys \['windo'\]"),
        ("seed=[", r"--set seed=\[: no valid YAML"),
        ("seed=many", r"TrainingConfig.seed: expected int, got 'many'"),
        ("followers={5: 1, windo: 3}", r"FollowersConfig: unknown keys \[5, 'windo'\]"),
        ("rank_weight='1e-1'", r"TrainingConfig.rank_weight: expected float, got '1e-1'"),
        ("batch_size=0", r"batch_size must be positive, is 0"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    with pytest.raises(ConfigError, match=message):
        override(TrainingConfig(), [change])
