import io

import numpy as np
import pytest
from PIL import Image

from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import leave_one_out
from speeder_engine.errors import ConfigError
from speeder_engine.synthetic import make_catalogue, write_synthetic_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_synthetic_dataset(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def dataset(folder):
    return load_dataset(folder)


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    again = write_synthetic_dataset(tmp_path / "again")
    names = ["covers.zip", "interactions.csv", "items.jsonl"]
    assert sorted(path.name for path in again.iterdir()) == names
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in names)
    other = write_synthetic_dataset(tmp_path / "other", num_users=50, seed=1)
    assert (other / "items.jsonl").read_bytes() != (folder / "items.jsonl").read_bytes()


def test_it_is_a_dataset_folder_of_the_size_asked_for(folder, dataset):
    every = load_dataset(folder, min_interactions=0)
    assert (every.num_users, every.num_items) == (1200, 400)
    assert every.lengths.min() >= 5
    assert every.lengths.max() <= 40
    assert all(len(set(every.history(user).tolist())) == length for user, length in enumerate(every.lengths))
    assert dataset.num_users == 1200
    assert dataset.num_items > 350
    assert len(set(every.items.titles)) == 400
    assert all(len(item_id) == 7 and item_id.isdigit() for item_id in every.item_ids)
    assert any(item_id.startswith("0") for item_id in every.item_ids)


def test_covers_are_images_that_tell_items_apart(dataset):
    contents = [dataset.items.images.read(item_id) for item_id in dataset.item_ids]
    pictures = [np.asarray(Image.open(io.BytesIO(content))) for content in contents]
    assert {picture.shape for picture in pictures} == {(144, 96, 3)}
    assert len({picture.tobytes() for picture in pictures}) == dataset.num_items
    grounds = np.array([picture[100, 2] for picture in pictures], np.int64)
    genres = np.array([text.split(". ")[1] for text in dataset.items.texts])
    means = np.array([grounds[genres == genre].mean(axis=0) for genre in np.unique(genres)])
    nearest = np.abs(grounds[:, None] - means).sum(axis=2).argmin(axis=1)
    assert (np.unique(genres)[nearest] == genres).all()


def _hit_rate(queries, scores, k=10):
    for row, query in enumerate(range(len(queries))):
        scores[row, queries.history(query)] = -1
    own = scores[np.arange(len(queries)), queries.targets]
    return ((scores > own[:, None]).sum(axis=1) < k).mean()


def test_order_helps_far_more_than_popularity_and_a_longer_past_more_than_the_last_item(dataset):
    split = leave_one_out(dataset)
    queries, train, num_items = split.queries("test"), split.train, dataset.num_items
    popularity = np.bincount(train.rows, minlength=num_items) / train.num_interactions
    follows = np.zeros((num_items, num_items))
    for user in range(train.num_users):
        history = train.history(user)
        np.add.at(follows, (history[:-1], history[1:]), 1)
    last = [queries.rows[queries.offsets[1:] - back] for back in (1, 2, 3)]
    markov = follows[last[0]] + popularity
    longer = sum(follows[rows] * 0.5**back for back, rows in enumerate(last)) + popularity
    popular = _hit_rate(queries, np.tile(popularity, (len(queries), 1)))
    assert popular < 0.2
    assert _hit_rate(queries, markov) > 3 * popular
    assert _hit_rate(queries, longer) > _hit_rate(queries, markov) + 0.03


def test_a_series_shares_its_words_and_a_neighbour_its_genre():
    catalogue = make_catalogue(1000, np.random.default_rng(3))
    for number, series in enumerate(catalogue.series):
        assert series.title(1).replace("Volume 1", "") in series.title(2)
        assert all(word in series.description(1) for word in (series.mood, series.genre.lower(), series.name))
        assert catalogue.series[catalogue.neighbour(number)].genre == series.genre
    assert catalogue.num_items == len(set(catalogue.item_ids)) == 1000


def test_large_catalogues_have_names_and_tiny_ones_are_refused(tmp_path):
    catalogue = make_catalogue(20_000, np.random.default_rng(0))
    assert len({series.name for series in catalogue.series}) == len(catalogue.series)
    assert len(set(catalogue.item_ids)) == 20_000
    with pytest.raises(ConfigError, match="99 items"):
        write_synthetic_dataset(tmp_path, num_items=99)
