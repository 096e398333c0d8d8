"""The title head against plain transformers, one prompt a candidate; generation against transformers' own."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import END_ID, make_tiny, make_titled, reference_generation, reference_title_scores
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from speeder_engine import (
    ArtifactError,
    ConfigError,
    DataError,
    Engine,
    EngineConfig,
    Generation,
    InvalidRequest,
    Item,
    Request,
)
from speeder_engine.config import MOST_ANSWER_IDS, HeadsConfig, ModelConfig
from speeder_engine.export.onnx_config import OnnxConfig
from speeder_engine.export.static_graph import StaticModel
from speeder_engine.inspection import inspect_engine
from speeder_engine.models.vocabulary import Vocabulary
from speeder_engine.parts import EngineParts
from speeder_engine.title import TitleTrie
from speeder_engine.title_text import TitleText, answer_text

ODD = [10, 11, 12, 13, 14, 15]  # nested, equal, empty, two lines


@pytest.fixture(scope="module")
def titled():
    return make_titled()


@pytest.fixture
def engine(titled):
    return Engine(titled.parts(), EngineConfig(dtype="float32", kv_budget="4MiB"))


@pytest.fixture
def cold(titled):
    return Engine(titled.parts(), EngineConfig(dtype="float32", kv_budget="0"))


def title_scores(engine, history, candidates, user_id=None):
    """By candidate, -inf of one that isn't answered."""
    ranking = engine.recommend(history, len(candidates), candidates=candidates, head="title", user_id=user_id)
    return dict.fromkeys(candidates, float("-inf")) | dict(ranking)


def test_a_model_of_titles_alone_answers_nothing_else(titled, tmp_path):
    """What no loss has touched is refused, and what needs no head goes on."""
    parts = titled.parts()
    heads = HeadsConfig(retrieve=False, rank=False, title=True)
    replace(parts, config=replace(parts.config, heads=heads)).save(tmp_path / "engine")
    alone = Engine.load(tmp_path / "engine", dtype="float32", kv_budget="4MiB")
    whole = Engine(parts, EngineConfig(dtype="float32", kv_budget="4MiB"))
    alone.warm_up()
    history, candidates = titled.ids(range(5)), titled.ids(range(10, 20))
    by_title = whole.recommend(history, candidates=candidates, head="title")
    assert (
        alone.recommend(history, candidates=candidates) == by_title != whole.recommend(history, candidates=candidates)
    )
    assert alone.generate([Request(history)]) == whole.generate([Request(history)])
    assert alone.similar_items("0001") == whole.similar_items("0001")
    assert alone.warm("a", history) == len(history)
    with pytest.raises(InvalidRequest, match="trained without a retrieve head; pass candidates"):
        alone.recommend(history)
    for head in ("retrieve", "rank"):
        with pytest.raises(InvalidRequest, match=f"trained without a {head} head; use 'title'"):
            alone.recommend(history, candidates=candidates, head=head)
    with pytest.raises(InvalidRequest, match="user_vectors: this model was trained without a retrieve head"):
        alone.user_vector(history)
    assert inspect_engine(tmp_path / "engine").heads == ("title",)
    with pytest.raises(ConfigError, match="without a retrieve head, and titles are not exported"):
        StaticModel(alone.parts, OnnxConfig())


@pytest.mark.parametrize("length", [0, 1, 7, 12, 13, 30])
@pytest.mark.parametrize(("tied", "how"), [(False, "sum"), (True, "mean")])
def test_scores_equal_one_prompt_a_candidate(length, tied, how):
    titled = make_titled(tied=tied, title_score=how, seed=length)
    engine = Engine(titled.parts(), EngineConfig(dtype="float32", kv_budget="4MiB"))
    rng = np.random.default_rng(length)
    rows, candidates = rng.integers(0, 120, length), np.array([*ODD, *rng.permutation(np.arange(16, 120))[:20]])
    expected = reference_title_scores(titled, rows, candidates, mean=how == "mean")
    engine.recommend(titled.ids(rows[: length // 2]), user_id="b")
    for user in (None, "a", "a", "b", "b"):  # cold, cold into a session, the same again, after an append
        scores = title_scores(engine, titled.ids(rows), titled.ids(candidates), user)
        found = torch.tensor([scores[item_id] for item_id in titled.ids(candidates)])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-6)
    engine.check_integrity()


def test_equal_titles_score_equal_and_keep_the_catalogues_order(titled, engine):
    ranking = engine.recommend(["0001"], candidates=["0013", "0011", "0015", "0040"], head="title")
    alike = [(item_id, score) for item_id, score in ranking if item_id != "0040"]
    assert [item_id for item_id, _ in alike] == ["0011", "0013", "0015"]
    assert len({score for _, score in alike}) == 1


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_a_candidate_without_a_title_is_not_answered(how):
    """To end at once is the likeliest of all answers, and means no item."""
    titled = make_titled(title_score=how)
    titled.titles[16] = " \n"
    engine = Engine(titled.parts(), EngineConfig(dtype="float32", kv_budget="4MiB"))
    asked = {"head": "title", "user_id": "a"}
    assert engine.recommend(["0001"], candidates=["0014", "0016"], **asked).items == ()
    ranking = engine.recommend(["0001"], candidates=["0014", "0010", "0016", "0040"], **asked)
    assert list(ranking) == list(engine.recommend(["0001"], candidates=["0010", "0040"], **asked))
    assert len(engine.recommend(["0001"], candidates=["0014", "0010"])) == 2  # other heads ask for no title
    engine.check_integrity()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitwise_whatever_stands_beside(titled, dtype):
    """Order and subset of candidates, sessions, and packing with requests of all heads."""
    warm = Engine(titled.parts(), EngineConfig(dtype=dtype, kv_budget="64KiB", max_batch_users=8))
    cold = Engine(titled.parts(), EngineConfig(dtype=dtype, kv_budget="0"))
    rng = np.random.default_rng(0)
    histories = {f"user {u}": [] for u in range(6)}
    asked, answered = [], []
    for turn in range(60):
        user = f"user {rng.integers(6)}"
        histories[user] += titled.ids(rng.integers(0, 120, rng.integers(0, 4)))
        candidates = titled.ids(rng.permutation(120)[: rng.integers(1, 21)])
        head = ("title", "rank", "retrieve", "title")[turn % 4]
        request = Request(tuple(histories[user]), 20, candidates=candidates, head=head)
        if turn % 8 == 2:
            request = Request(tuple(histories[user]), 20)
        answer = warm.recommend_many([replace(request, user_id=user)])[0]
        assert answer == cold.recommend_many([request])[0]
        if head == "title":
            few = candidates[::-1][: rng.integers(1, len(candidates) + 1)]
            whole = {titled.item_ids[14]: float("-inf")} | dict(answer)
            assert title_scores(cold, request.history, few) == {item_id: whole[item_id] for item_id in few}
        warm.check_integrity()
        asked.append(request)
        answered.append(answer)
    assert cold.recommend_many(asked) == answered
    assert warm.recommend_many(asked[::-1]) == answered[::-1]


def test_nothing_of_the_text_is_kept(titled, engine):
    ids = titled.ids(range(8))
    plain = Engine(titled.parts(), EngineConfig(dtype="float32", kv_budget="4MiB"))
    expected = [plain.recommend(ids[:n], user_id="a") for n in (8, 8)]
    title_scores(engine, ids, ids, "a")
    engine.generate([Request(ids, user_id="a")])
    before = engine.stats().rows_computed
    assert [engine.recommend(ids, user_id="a") for _ in range(2)] == expected
    assert engine.stats().rows_computed == before


def test_one_pass_computes_every_shared_beginning_once(titled, engine):
    engine.recommend(["0001"], user_id="a")
    text, before = TitleText(titled.tokenizer, 512), engine.stats().rows_computed
    title_scores(engine, ["0001"], ["0010", "0011", "0012", "0013"], "a")
    inner = {ids[:n] for ids in text.answers(titled.titles[10:14]) for n in range(1, len(ids))}
    assert engine.stats().rows_computed - before == len(titled.model.config.prompt.question_ids) + len(inner)


def test_the_vocabulary_is_scored_for_titles_alone(titled, engine, monkeypatch):
    calls = []
    logits = Vocabulary.logits
    monkeypatch.setattr(Vocabulary, "logits", lambda self, hidden: calls.append(len(hidden)) or logits(self, hidden))
    ids = titled.ids(range(6))
    engine.recommend(ids, user_id="a")
    engine.recommend(ids, candidates=ids)
    engine.recommend(ids, candidates=ids, head="retrieve")
    engine.user_vector(ids)
    engine.similar_items("0001")
    assert calls == []
    title_scores(engine, ids, ids)
    assert len(calls) == 1
    engine.generate([Request(ids)], max_tokens=3)
    assert 1 < len(calls) <= 4


@pytest.mark.parametrize("seed", range(4))
def test_generation_equals_transformers(seed):
    titled = make_titled(seed=seed, tied=seed == 3)
    engine = Engine(titled.parts(), EngineConfig(dtype="float32", kv_budget="4MiB"))
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, 120, length) for length in (0, 1, 5, 12, 13, 30)]
    expected = [reference_generation(titled, rows) for rows in histories]
    assert len(set(expected)) > 1
    requests = [Request(titled.ids(rows), user_id=f"{i}") for i, rows in enumerate(histories)]
    for _ in range(2):  # cold, and from sessions
        assert [answer.text for answer in engine.generate(requests)] == expected
    assert [engine.generate([request])[0].text for request in requests] == expected
    assert engine.generate(requests, max_tokens=2)[0].text == reference_generation(titled, histories[0], 2)
    engine.check_integrity()


def writes(monkeypatch, titled, text):
    """Makes the model write `text`, whatever it was asked."""
    ids = iter(titled.tokenizer.encode(text).ids + [END_ID] * 9)

    def logits(self, hidden):
        out = hidden.new_zeros(hidden.shape[0], 400)
        out[:, next(ids)] = 1
        return out

    monkeypatch.setattr(Vocabulary, "logits", logits)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("the old man\nand more", {}, "0011"),
        (" the old man \n", {"candidates": ["0012", "0013", "0011"]}, "0011"),
        ("the old man\n", {"candidates": ["0013", "0012"]}, "0013"),
        ("the old man", {"deny": ["0011"]}, "0013"),
        ("the old man", {"deny": ["0011", "0013", "0015"]}, None),
        ("the old man", {"candidates": ["0012"]}, None),
        ("The old man\n", {}, None),
        ("\nthe old man", {}, None),  # though 0014 has no title
    ],
)
def test_what_was_written_names_an_item_or_none(titled, engine, monkeypatch, text, options, expected):
    writes(monkeypatch, titled, text)
    (found,) = engine.generate([Request(["0001"], **options)])
    assert found == Generation(text.split("\n")[0].strip(), expected, expected is not None)


def test_a_failed_generation_leaves_sessions_as_they_were(titled, engine, cold, monkeypatch):
    ids = titled.ids(range(9))
    engine.recommend(ids[:6], user_id="a")
    free = engine._now().cache.manager.stats()["num_free_blocks"]
    calls = []

    def fail(self, hidden):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("injected")
        return hidden.new_zeros(hidden.shape[0], 400)

    monkeypatch.setattr(Vocabulary, "logits", fail)
    with pytest.raises(RuntimeError, match="injected"):
        engine.generate([Request([*ids[:3], ids[8]], user_id="a")])
    monkeypatch.undo()
    engine.check_integrity()
    assert engine._now().cache.manager.stats()["num_free_blocks"] == free
    before = engine.stats().rows_computed
    assert engine.recommend(ids[:6], user_id="a") == cold.recommend(ids[:6])
    assert engine.stats().rows_computed == before


def test_two_requests_of_one_user_in_one_batch(titled, engine, cold):
    ids = titled.ids(range(10))
    requests = [Request(ids[:5], user_id="a"), Request(ids[:7], user_id="a"), Request(ids[3:9], user_id="a")]
    asked = [replace(request, candidates=ids, head="title") for request in requests]
    expected = [cold.recommend_many([replace(request, user_id=None)])[0] for request in asked]
    written = [cold.generate([replace(request, user_id=None)])[0] for request in requests]
    for _ in range(2):
        assert engine.recommend_many(asked) == expected
        assert engine.generate(requests) == written
    engine.check_integrity()


def test_edges(titled, engine):
    assert engine.generate([]) == []
    assert engine.recommend(["0001"], candidates=["nope"], head="title", on_unknown="skip").items == ()
    engine.catalogue.available[11] = False
    assert engine.recommend([], candidates=["0011", "0010"], head="title").items == ("0010",)
    assert len(engine.recommend([], 2, candidates=titled.item_ids, head="title")) == 2


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda engine: engine.recommend([], candidates=["0001"], head="title"), "without a title head; use 'rank'"),
        (lambda engine: engine.recommend([], head="title"), "'title' scores named candidates; pass candidates"),
        (lambda engine: engine.generate([Request([])]), "generate: this model was trained without a title head"),
        (lambda engine: engine.generate([Request([])], max_tokens=0), "max_tokens: expected a whole number"),
        (lambda engine: engine.generate(Request([])), "generate: expected a list"),
    ],
)
def test_what_cannot_be_asked_is_refused(ask, message):
    engine = Engine(make_tiny().parts(), EngineConfig(dtype="float32"))
    with pytest.raises(InvalidRequest, match=message):
        ask(engine)
    assert engine.stats().rows_computed == 0


def test_an_engine_directory_carries_words_and_tokenizer(titled, engine, tmp_path):
    titled.parts().save(tmp_path / "e")
    loaded = Engine.load(tmp_path / "e", dtype="float32")
    ids = titled.ids(range(20))
    assert title_scores(loaded, ids[:4], ids) == title_scores(engine, ids[:4], ids)
    assert loaded.generate([Request(ids[:4])]) == engine.generate([Request(ids[:4])])


def test_a_missing_tokenizer_is_missed_when_titles_are_asked_for(titled, tmp_path):
    parts = replace(titled.parts(), tokenizer=None)
    with pytest.raises(ConfigError, match="tokenizer: a model with a title head needs one"):
        Engine(parts).recommend([], candidates=["0001"], head="title")
    parts.save(tmp_path / "e")
    engine = Engine.load(tmp_path / "e")
    assert len(engine.recommend([])) == 10
    with pytest.raises(ArtifactError, match=r"holds no tokenizer/tokenizer\.json"):
        engine.recommend([], candidates=["0001"], head="title")


def test_tied_weights_are_stored_once():
    names = {tied: set(make_titled(tied=tied).parts().model.state_dict()) for tied in (False, True)}
    assert names[False] - names[True] == {"vocabulary.head"}
    assert "vocabulary.embedding" in names[True]
    assert not [name for name in make_tiny().parts().model.state_dict() if "vocabulary" in name]


def test_ids_equal_those_of_transformers(titled, tmp_path):
    fast = PreTrainedTokenizerFast(tokenizer_object=titled.tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    text = TitleText(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), 512)
    titles = [title for title in titled.titles if title]
    expected = [fast(f"{answer_text(t)}\n", add_special_tokens=False)["input_ids"] for t in titles]
    assert [list(ids) for ids in text.answers(titles)] == expected
    assert [text.decode(ids) for ids in text.answers(titles)] == [f"{answer_text(t)}\n" for t in titles]


def test_a_tokenizer_that_was_replaced_is_not_read(titled, tmp_path):
    """It is read when a title is first asked for; another's ids would be answered without a word."""
    titled.parts().save(tmp_path / "engine")
    engine = Engine.load(tmp_path / "engine", dtype="float32")
    make_titled(seed=1).parts().save(tmp_path / "engine")
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"tokenizer.json: was changed since the engine was loaded; reload"):
            title_scores(engine, ["0001"], ["0010"])
    engine.reload(tmp_path / "engine")
    assert title_scores(engine, ["0001"], ["0010"])["0010"] < 0


def test_a_directory_is_found_again_wherever_process_and_links_have_gone(titled, tmp_path, monkeypatch):
    """The tokenizer is read when the first title is asked for."""
    titled.parts().save(tmp_path / "v1")
    make_tiny().parts().save(tmp_path / "v2")
    (tmp_path / "current").symlink_to("v1")
    monkeypatch.chdir(tmp_path)
    engines = [Engine.load(path, kv_budget="0") for path in ("v1", "current")]
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("v2")
    monkeypatch.chdir("/")
    for engine in engines:
        assert title_scores(engine, ["0001"], ["0010"])["0010"] < 0
        engine.save(tmp_path / "saved")


def test_a_waiting_request_is_answered_by_titles_as_they_stand(titled):
    engine = Engine(titled.parts(), EngineConfig(dtype="float32", batch_wait_ms=500))
    request = Request(["0001"], candidates=["0010", "0020"], head="title")

    async def change_while_it_waits():
        waiting = asyncio.ensure_future(engine.submit(request))
        await asyncio.sleep(0.05)
        engine.upsert([Item("0010", title="the sea and the two kings")])
        return await waiting

    before = engine.recommend_many([request])[0]
    assert asyncio.run(change_while_it_waits()) == engine.recommend_many([request])[0] != before


def test_a_waiting_request_reads_titles_once_where_none_changes(titled, monkeypatch):
    built, build = [], TitleTrie.build
    monkeypatch.setattr(TitleTrie, "build", lambda *given: built.append(1) or build(*given))
    engine = Engine(titled.parts(), EngineConfig(dtype="float32", max_batch_users=1))
    requests = [Request([item], candidates=["0010", "0020"], head="title") for item in ("0001", "0002", "0003")]

    async def submit_all():
        return await asyncio.gather(*map(engine.submit, requests))

    answers = asyncio.run(submit_all())
    assert len(built) == 3
    assert answers == engine.recommend_many(requests)


def test_long_titles_are_cut_and_tokenizers_without_newline_refused(titled):
    (ids,) = TitleText(titled.tokenizer, 512).answers(["sea " * 500])
    assert len(ids) == MOST_ANSWER_IDS
    deaf = Tokenizer.from_str(titled.tokenizer.to_str())
    from tokenizers import normalizers

    deaf.normalizer = normalizers.Strip()
    with pytest.raises(ConfigError, match="drops newlines"):
        TitleText(deaf, 512)


def test_a_title_beyond_the_models_words_is_refused_before_it_is_in_the_catalogue(titled):
    """A tokenizer may have been given words that the model has no embedding for; no pass may be asked for one."""
    wider = Tokenizer.from_str(titled.tokenizer.to_str())
    wider.add_tokens([f"<new {number}>" for number in range(100)])
    engine = Engine(replace(titled.parts(), tokenizer=wider), EngineConfig(dtype="float32", kv_budget="4MiB"))
    with pytest.raises(DataError, match=r"title 'the <new 99>': .* token 4\d\d, the vocabulary ends at 399"):
        engine.upsert([Item("new", title="fine"), Item("0010", title="the <new 99>")])
    assert "new" not in engine.catalogue and engine.catalogue.title("0010") == titled.titles[10]


def test_a_trie_shares_beginnings_and_gives_leaves_no_row():
    trie = TitleTrie.build([7, 8], [(1, 2, 9), (1, 3, 9), (1, 2, 4, 9), (5,), (1, 2, 9), (1, 2)])
    assert trie.tokens.tolist() == [7, 8, 1, 2, 3, 4]
    assert trie.parents.tolist() == [-1, 0, 1, 2, 2, 3]
    assert trie.depths.tolist() == [0, 1, 2, 3, 3, 4]
    spelt = [[trie.edge_tokens[e] for e in path if e >= 0] for path in trie.answers]
    assert spelt == [[1, 2, 9], [1, 3, 9], [1, 2, 4, 9], [5], [1, 2, 9], [1, 2]]
    assert trie.paths()[5].tolist() == [0, 1, 2, 3, 5]
    assert trie.paths()[4].tolist() == [0, 1, 2, 4, -1]
    assert trie.edge_rows.min() >= trie.first_read == 1
    assert TitleTrie.build([7, 8], []).num_rows == 2


def test_settings_that_do_not_fit(titled):
    config = titled.model.config
    with pytest.raises(ConfigError, match="title_score: 'max'; choose"):
        HeadsConfig(title=True, title_score="max")
    with pytest.raises(ConfigError, match="needs a question"):
        replace(config, prompt=replace(config.prompt, question_ids=()))
    old = config.to_json()
    del old["vocabulary_tied"], old["heads"]["title"], old["heads"]["title_score"]
    del old["prompt"]["question"], old["prompt"]["question_ids"], old["prompt"]["end_ids"]
    assert ModelConfig.from_json(old).heads == HeadsConfig()
    assert EngineParts.__dataclass_fields__["tokenizer"].default is None
