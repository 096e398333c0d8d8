"""Every contender of the benchmark does the same work: it answers as the engine does, in fp32 within 1e-4."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from baselines.base import Unavailable
from baselines.exported import OpenVino
from baselines.faiss_flat import FaissFlat, TorchTopK
from baselines.registry import BASELINES, EAGER, make
from baselines.speeder import Speeder
from baselines.speeder_training import SpeederTraining
from baselines.text_generation import MultimodalGeneration, TextGeneration
from baselines.text_training import TextTraining
from subject import Subject
from workload import Workload, make_users

from speeder_engine.config import DecoderConfig
from speeder_engine.errors import ConfigError

SMALL = DecoderConfig(300, 32, 2, 4, 2, 8, 64, qkv_bias=True)
FAMILIES = {
    "qwen2": SMALL,
    "llama": replace(SMALL, qkv_bias=False),
    "llama with biases": replace(SMALL, out_bias=True, mlp_bias=True),
    "qwen3": replace(SMALL, qkv_bias=False, qk_norm=True, head_dim=16),
}
# a compiler takes its time for each layer, and a second one is all the same to it: of several layers there is the
# eager model's test, whose forward this one compiles, and those of exports, in tests/export
COMPILED = ("transformers_compiled", "onnxruntime", "openvino")
ONE_TOKEN = ("transformers", "transformers_static", "separate_prompts", *COMPILED, "llama_cpp")
PACKAGES = {"onnxruntime": ["onnxruntime"], "openvino": ["openvino"], "llama_cpp": ["llama_cpp", "gguf"]}


def small(shape=SMALL, dtype="float32", **lengths):
    return Subject.random(shape, num_items=150, dtype=dtype, device="cpu", workload=Workload(**lengths))


@pytest.fixture(scope="module")
def subject():
    return small()


@pytest.fixture(scope="module")
def one_layer():
    return small(replace(SMALL, num_layers=1))


@pytest.fixture(scope="module")
def users(subject):
    return make_users(3, subject.num_items, subject.workload, 5)


@pytest.fixture(scope="module")
def engine_answers(subject, users):
    return answers_of_an_engine(subject, users)


@pytest.fixture(scope="module")
def one_layers_answers(one_layer, users):
    return answers_of_an_engine(one_layer, users)


def answers_of_an_engine(subject, users):
    """(cold, warm) of each user."""
    engine, found = Speeder(subject, kv_budget="8MiB"), []
    for user in users:
        cold = engine.answer(user).scores
        engine.warm_up(user)
        found.append((cold, engine.answer_warm(user).scores))
    engine.close()
    return found


def test_the_engine_computes_the_rows_of_the_workload(subject, users):
    contender = Speeder(subject, kv_budget="8MiB")
    before = contender.engine.stats().rows_computed
    contender.answer(users[0])
    assert contender.engine.stats().rows_computed - before == subject.workload.cold_rows == 50
    contender.warm_up(users[0])
    before = contender.engine.stats().rows_computed
    contender.answer_warm(users[0])
    assert contender.engine.stats().rows_computed - before == subject.workload.warm_rows == 21
    contender.close()


@pytest.mark.parametrize("key", ONE_TOKEN)
def test_one_token_an_item_scores_as_the_engine_does(request, users, key):
    for package in PACKAGES.get(key, ()):
        pytest.importorskip(package)
    names = ("one_layer", "one_layers_answers") if key in COMPILED else ("subject", "engine_answers")
    subject, engine_answers = map(request.getfixturevalue, names)
    # by itself OpenVINO takes half precision where the CPU has it
    contender = make(key, subject) if key != "openvino" else OpenVino(subject, "f32")
    for _ in range(2):  # a request leaves nothing behind
        for user, (cold, warm) in zip(users, engine_answers, strict=True):
            assert np.abs(contender.answer(user).scores - cold).max() <= 1e-4
            contender.warm_up(user)
            assert np.abs(contender.answer_warm(user).scores - warm).max() <= 1e-4
    contender.close()
    spread = np.ptp(np.stack([scores for pair in engine_answers for scores in pair]), axis=0)
    assert spread.min() > 2e-4  # other users' answers would not have passed


@pytest.mark.parametrize("spins", ["0", "1"])
def test_onnx_runtimes_threads_spin_where_they_are_asked_to(one_layer, monkeypatch, spins):
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("GOMP_SPINCOUNT", spins)
    contender = make("onnxruntime", one_layer)
    options = contender.engine._session("extend")._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins
    contender.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_the_engines_weights_in_every_family(family):
    subject = small(FAMILIES[family], history_len=5, num_candidates=4)
    assert subject.transformers().config.model_type == family.split()[0]
    user = make_users(1, subject.num_items, subject.workload, 0)[0]
    engine = Speeder(subject, kv_budget="8MiB")
    for key in EAGER:
        assert np.abs(make(key, subject).answer(user).scores - engine.answer(user).scores).max() <= 1e-4
    engine.close()


def test_weights_are_held_once(subject):
    fused = subject.weights["decoder.layers.1.qkv.weight"]
    attention = subject.transformers().model.layers[1].self_attn
    shared = fused.untyped_storage().data_ptr()
    for each in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert each.weight.untyped_storage().data_ptr() == shared
    engine = subject.engine(kv_budget="1MiB")
    assert engine.model.decoder.layers[1].qkv.weight.untyped_storage().data_ptr() == shared
    engine.close()


def test_rows_are_what_the_layout_says(subject, users):
    cold, warm, whole = (subject.rows(users[0], **how) for how in ({}, {"warm": True}, {"warm": True, "whole": True}))
    assert (cold.num_rows, cold.past, warm.num_rows, warm.past, whole.num_rows, whole.past) == (50, 30, 21, 60, 81, 0)
    assert warm.positions.tolist() == [60] + [61] * 20
    assert torch.equal(whole.embeddings[-21:], warm.embeddings)
    assert torch.equal(whole.mask[-21:], warm.mask)
    assert warm.mask[3].nonzero().flatten().tolist() == [*range(61), 63]  # history and itself, no other candidate


def test_a_window_that_slides_is_refused(subject, users):
    longer = replace(users[0], history=tuple(range(50)), next_item=60)
    with pytest.raises(ValueError, match="the window slides at 51 items"):
        subject.rows(longer, warm=True)


@pytest.mark.parametrize("key", ["transformers_static", "text_generation"])
def test_who_was_not_here_cannot_return(subject, users, key):
    with pytest.raises(ValueError, match="call warm_up before answer_warm"):
        make(key, subject).answer_warm(users[0])


@pytest.mark.parametrize("kind", [TextGeneration, MultimodalGeneration])
def test_generation_writes_what_transformers_would(subject, users, kind):
    contender, user = kind(subject), users[0]
    rows = torch.cat([contender._beginning(user), contender._titles(user.candidates)])
    assert len(rows) == (900 if kind is TextGeneration else 1860)
    written = contender.write(user)
    expected = subject.transformers().generate(
        inputs_embeds=rows[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert written == expected[0].tolist()
    assert contender.answer(user).text_tokens == 12
    for _ in range(2):
        contender.warm_up(user)
        assert contender.write_warm(user) == contender.write(replace(user, history=user.grown))


def test_missing_packages_are_one_line(one_layer, monkeypatch):
    for package in ("openvino", "faiss", "llama_cpp", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("baselines.exported.export_of", lambda subject: pytest.fail("exported in vain"))
    with pytest.raises(Unavailable, match=r"^openvino is not installed: pip install 'speeder-engine\[bench\]'$"):
        make("openvino", one_layer)
    with pytest.raises(Unavailable, match=r"^faiss is not installed: pip install 'speeder-engine\[bench\]'$"):
        FaissFlat(one_layer.catalogue.tokens)
    with pytest.raises(Unavailable, match=r"needs the package onnxruntime: pip install 'speeder-engine\[ort\]'$"):
        make("onnxruntime", one_layer)
    with pytest.raises(Unavailable, match=r"^[a-z_]+ is not installed: pip install llama-cpp-python gguf "):
        make("llama_cpp", one_layer)


def test_an_export_that_does_not_fit_is_one_line(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("baselines.exports.available_memory", lambda: 1024)
    with pytest.raises(Unavailable, match=r"^an ONNX export in fp32 needs 0.0 GiB of memory, 0.0 are free$"):
        make("onnxruntime", small())


def test_an_unknown_contender_names_those_there_are(subject):
    with pytest.raises(ValueError, match="no contender 'vllm'; choose of transformers, transformers_static"):
        make("vllm", subject)


def test_keys_are_those_of_the_contenders():
    assert all(kind.key == key for key, kind in BASELINES.items())
    assert all(key.replace("_", "").isalnum() for key in BASELINES)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_catalogue_is_searched_alike(precision):
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    tokens, queries = torch.randn(2000, 64, generator=generator), torch.randn(5, 64, generator=generator)
    kind = getattr(torch, precision)
    expected, expected_rows = (queries.double() @ tokens.double().T).topk(10)
    for contender in (FaissFlat(tokens, precision), TorchTopK(tokens.to(kind))):
        scores, rows = contender.search(queries, 10)
        assert scores == pytest.approx(expected.numpy(), rel=4 * torch.finfo(kind).eps, abs=4 * torch.finfo(kind).eps)
        if precision == "float32":
            assert rows.tolist() == expected_rows.tolist()


def test_faiss_multiplies_for_a_batch_and_scans_for_one():
    """By itself it scans for 64 users of 896, several times slower than it can be."""
    faiss = pytest.importorskip("faiss")
    before, found = faiss.cvar.distance_compute_blas_threshold, []
    contender = FaissFlat(torch.randn(100, 896))
    search = contender.index.search

    def watched(queries, k):
        found.append(faiss.cvar.distance_compute_blas_threshold)
        return search(queries, k)

    contender.index.search = watched
    for users in (1, 64):
        contender.search(torch.randn(users, 896), 5)
    assert found == [before, 1] and faiss.cvar.distance_compute_blas_threshold == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_runs_train_adapters_and_leave_the_subject_alone(dtype):
    pytest.importorskip("peft")
    subject = small(dtype=dtype)
    before = {name: value.clone() for name, value in subject.weights.items()}
    for run, targets in ((TextTraining(subject, batch_size=2), 2), (SpeederTraining(subject, batch_size=4), 4 * 31)):
        trained = [parameter.detach().clone() for parameter in run.stepper.trained]
        assert [run.step() for _ in range(2)] == [targets, targets]
        moved = [not torch.equal(old, new) for old, new in zip(trained, run.stepper.trained, strict=True)]
        assert sum(moved) > len(moved) / 2
    assert all(torch.equal(value, before[name]) for name, value in subject.weights.items())


def test_a_training_prompt_is_the_workloads_and_its_answer(subject):
    pytest.importorskip("peft")
    assert TextTraining(subject, batch_size=3)._batch().shape == (3, 900 + 12)


def test_an_engine_directory_is_a_subject_too(subject, users, engine_answers, tmp_path):
    subject.parts.save(tmp_path / "engine")
    loaded = Subject.load(tmp_path / "engine", dtype="float32", device="cpu")
    assert loaded.workload == subject.workload
    scores = make("transformers_static", loaded).answer(users[0]).scores
    assert np.abs(scores - engine_answers[0][0]).max() <= 1e-4
    with pytest.raises(ConfigError, match="a window of 50 can't hold the benchmark's 50 items and one more"):
        Subject.load(tmp_path / "engine", dtype="float32", device="cpu", workload=Workload(history_len=50))
