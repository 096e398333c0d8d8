"""The service of docs/service.md as it stands, asked through HTTP; the answers are those of the engine."""

import importlib.util
import json
import re
import sys

import pytest
from fastapi.testclient import TestClient

from speeder_engine import DeadlineExceeded, Engine, EngineClosed, QueueFull, Request, SpeederError
from speeder_engine.random_engine import random_parts


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("service") / "engine"
    random_parts("tiny", num_items=300).save(path)
    return Engine.load(path)


@pytest.fixture(scope="module")
def service(engine, root, tmp_path_factory):
    (source,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "service.md").read_text("utf-8"), flags=re.DOTALL)
    path = tmp_path_factory.mktemp("document") / "service.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("documented_service", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where annotations are looked up
        patch.setenv("SPEEDER_ENGINE", str(engine.parts.artifact.path))
        spec.loader.exec_module(module)
        with TestClient(module.app, raise_server_exceptions=False) as client:
            client.engine = module.app.state.engine
            yield client


def test_answers_are_the_engines(engine, service):
    ids = engine.catalogue.item_ids
    for asked in (
        {"history": ids[:3], "user_id": "ada", "k": 5},
        {"history": [], "candidates": ids[20:40]},
        {"history": ids[:9], "allow": ids[:50], "exclude_seen": False},
        {"history": [ids[0], "new"], "on_unknown": "skip"},
    ):
        answer = service.post("/recommend", json={key: _json(value) for key, value in asked.items()})
        (expected,) = engine.recommend_many([Request(**asked)])
        assert answer.status_code == 200
        assert answer.json() == {name: list(getattr(expected, name)) for name in ("items", "scores", "unknown")}


def _json(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"history": ["nope"]}, "history: unknown item 'nope'"),
        ({"history": [], "k": 0}, "k: expected a whole number of at least 1, got 0"),
        ({"history": "abc"}, "history"),
        ({"history": [], "candidats": ["a"]}, "candidats"),
        ({"history": [], "times": []}, "times: this model was trained without"),
        ({}, "history"),
        ({"history": [], "times": [float("nan")]}, "times: 1 for 0 interactions; give one for each"),
        ({"history": [3]}, "history: 0: Input should be a valid string"),
        ({"history": [], "foo": float("inf")}, "foo: Unexpected keyword argument"),
        ({"history": [], "user_id": "\ud800"}, "user_id: "),
        ({"history": ["\ud800"], "on_unknown": "skip"}, "history: item id '\\ud800' is no valid Unicode text"),
        ({"history": [], "candidates": ["\ud800"], "on_unknown": "skip"}, "candidates: item id '\\ud800' is no valid"),
        ({"history": [], "\ud800": 1}, "unable to parse raw data as a unicode string"),
        ({"history": ["0000001"] * 100_000, "k": 0}, "k: expected a whole number"),
    ],
)
def test_a_wrong_request_is_told_what_to_mend(service, asked, told):
    answer = service.post("/recommend", content=json.dumps(asked), headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert told in answer.json()["detail"]
    assert len(answer.content) < 1200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QueueFull("full"), 503),
        (DeadlineExceeded("late"), 504),
        (EngineClosed("closed"), 503),
        (SpeederError("?"), 500),
    ],
)
def test_what_is_no_fault_of_the_callers(service, monkeypatch, error, status):
    async def submit(request, *, timeout_ms):
        raise error

    monkeypatch.setattr(service.engine, "submit", submit)
    answer = service.post("/recommend", json={"history": []})
    assert (answer.status_code, answer.json()) == (status, {"detail": str(error)})


def test_counters(service):
    before = service.get("/stats").json()["requests"]
    service.post("/recommend", json={"history": []})
    assert service.get("/stats").json()["requests"] == before + 1
