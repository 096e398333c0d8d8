"""Judge: scikit-learn's own vectorizer and decomposition, on the fitted vocabulary."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from speeder_engine.encoders.fitted_text import WORD, FittedTextEncoder
from speeder_engine.encoders.load import load_encoder
from speeder_engine.errors import ArtifactError, DataError

TOPICS = (["ship", "sea", "storm", "sailor", "île"], ["court", "judge", "crime", "lawyer", "Prozeß"])


@pytest.fixture(scope="module")
def texts():
    generator = np.random.default_rng(0)
    return [" ".join([*generator.choice(TOPICS[row % 2], 6), "the", f"w{row % 40}"]) for row in range(240)]


@pytest.fixture(scope="module")
def encoder(texts):
    return FittedTextEncoder.fit(texts, dim=8)


def test_encodes_as_scikit_learn_transforms(texts, encoder):
    judge = TfidfVectorizer(token_pattern=WORD, sublinear_tf=True, vocabulary=encoder.words)
    judge.idf_ = encoder.idf.astype(np.float64)
    news = [*texts[:50], "Storm, STORM at sea: the judge sails to w3", "one known word: crime"]
    expected = normalize(judge.transform(news) @ encoder.components.T)
    np.testing.assert_allclose(encoder.encode(news).values, expected, atol=1e-5)


def test_idf_is_what_scikit_learn_fits(texts, encoder):
    judge = TfidfVectorizer(token_pattern=WORD, min_df=2, max_df=0.5).fit(texts)
    assert encoder.words == judge.get_feature_names_out().tolist()
    np.testing.assert_allclose(encoder.idf, judge.idf_, rtol=1e-6)
    assert "the" not in encoder.words and "île" in encoder.words


def test_neighbours_share_the_topic(texts, encoder):
    values = encoder.encode(texts).values
    cosines = values @ values.T - 2 * np.eye(len(values))
    assert (cosines.argmax(1) % 2 == np.arange(len(values)) % 2).mean() > 0.95


def test_save_and_load_change_nothing(texts, encoder, tmp_path):
    encoder.save(tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(loaded.encode(texts).values, encoder.encode(texts).values)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_nothing_to_say_is_not_present(encoder):
    features = encoder.encode(["", None, "  ", "zzz unknown", "ship"])
    np.testing.assert_array_equal(features.present, [False, False, False, False, True])


def test_shrinks_to_what_few_texts_can_span():
    few = FittedTextEncoder.fit(["red hat", "blue hat", None])
    assert few.dim == 2
    assert few.encode(["hat"]).present.all()


def test_refuses_a_catalogue_without_words():
    with pytest.raises(DataError, match="no word"):
        FittedTextEncoder.fit(["", None, "!"])


def test_a_foreign_manifest_is_named(encoder, tmp_path):
    encoder.save(tmp_path)
    manifest = tmp_path / "encoder.json"
    manifest.write_text(manifest.read_text().replace("fitted-text", "other-kind"))
    with pytest.raises(ArtifactError, match="other-kind"):
        load_encoder(tmp_path)
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(ArtifactError, match=r"encoder\.json"):
        load_encoder(tmp_path)
