"""Engines with weights, keys and values in 8 bits, through the references: transformers judges them, with the same
rounded by torch alone. That an answer does not depend on what stands beside is held in `test_engine_properties.py`."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from reference import make_tiny, make_titled, reference_scores, reference_start, reference_title_scores
from torch import nn
from transformers import DynamicCache

from speeder_engine import ConfigError, Engine, EngineConfig, Request
from speeder_engine.device import pick_kv_dtype
from speeder_engine.parts import EngineParts

LARGEST = {"int8": 127, "fp8": 448}
KINDS = ["int8", "fp8"]
by_kind = pytest.mark.parametrize("kind", KINDS)


def rounded(x, kind):
    """x [..., n] as 8 bits hold it, each row with a scale of its own; torch's types do the rounding."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-20) / LARGEST[kind]
    small = (x / scale).round() if kind == "int8" else (x / scale).to(torch.float8_e4m3fn).float()
    return small * scale


@torch.no_grad()
def round_weights(backbone, kind):
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(rounded(module.weight, kind))


def made(parts, **settings):
    given = {"dtype": "float32", "cpu_path": "torch", "kv_budget": "4MiB", "debug": True}
    return Engine(parts, EngineConfig(**given | settings))


def scores_of(ranking, ids):
    return torch.tensor([dict(ranking)[item_id] for item_id in ids])


@by_kind
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_answer_as_transformers_with_the_same_weights(family, kind):
    tiny, rng = make_tiny(family=family), np.random.default_rng(0)
    engine, plain = made(tiny.parts(), weights=kind), reference_scores(tiny, [3, 4, 5])[0]
    round_weights(tiny.model.backbone, kind)
    rows, candidates = rng.integers(0, 120, 17), rng.permutation(120)[:9]
    for length in (0, 1, 8, 12, 17):
        retrieve, rank = reference_scores(tiny, rows[:length], candidates)
        for user in (None, "a", "a"):
            asked = {"history": tiny.ids(rows[:length]), "user_id": user}
            found = engine.recommend(**asked, k=120, exclude_seen=False)
            torch.testing.assert_close(scores_of(found, tiny.item_ids), retrieve, atol=2e-5, rtol=1e-5)
            found = engine.recommend(**asked, candidates=tiny.ids(candidates), k=9)
            torch.testing.assert_close(scores_of(found, tiny.ids(candidates)), rank, atol=2e-5, rtol=1e-5)
    # and not as with the weights that were loaded
    found = engine.recommend(tiny.ids([3, 4, 5]), k=120, exclude_seen=False)
    assert (scores_of(found, tiny.item_ids) - plain).abs().max() > 1e-3


class RoundingCache(DynamicCache):
    """transformers' cache, which keeps what 8 bits hold; `own_exact`: a pass reads its own keys as they were."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.own_exact = kind, False

    def update(self, keys, values, layer, *args, **options):
        found = super().update(rounded(keys, self.kind), rounded(values, self.kind), layer, *args, **options)
        if not self.own_exact:
            return found
        own = keys.shape[-2]
        return tuple(
            torch.cat([all_[..., :-own, :], each], -2) for all_, each in zip(found, (keys, values), strict=True)
        )


@torch.no_grad()
def rounded_scores(tiny, kind, rows, candidates):
    """As `reference_scores`, by three passes over one cache: instruction, history, and a candidate each."""
    model, cache = tiny.model, RoundingCache(kind)
    rows = np.asarray(rows, np.int64)[reference_start(len(rows), tiny.window, tiny.step) :]

    def last(embeddings, cache, own_exact):
        cache.own_exact = own_exact
        return model.backbone(inputs_embeds=embeddings[None], past_key_values=cache).last_hidden_state[0, -1]

    hidden = last(model.backbone.embed_tokens(torch.tensor(model.config.prompt.instruction_ids)), cache, True)
    if len(rows):
        hidden = last(tiny.tokens[torch.from_numpy(rows)] + model.prompts.weight[: len(rows)], cache, False)
    vector = model.retrieve.project(hidden) / (model.config.compressor.scale * 48**0.5)
    retrieve, ranked = tiny.tokens @ vector + model.retrieve.beta * tiny.prior, []
    for row in candidates:
        own = tiny.tokens[row] + model.prompts.weight[len(rows)] + model.rank.role
        score = last(own[None], copy.deepcopy(cache), True) @ model.rank.weight + model.rank.bias
        ranked.append(score + model.rank.alpha * (tiny.tokens[row] @ vector) + model.rank.beta * tiny.prior[row])
    return retrieve, torch.stack(ranked)


# what another order of sums may change: one of some 3,000 cached elements on the other side of a border, a step of its
# type away. All of them rounded move scores by 20 times as much
ONE_STEP = {"int8": 2e-4, "fp8": 1e-3}


@by_kind
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_keys_and_values_answer_as_transformers_with_a_rounding_cache(family, kind):
    tiny, rng = make_tiny(family=family), np.random.default_rng(1)
    engine, cold, moved = made(tiny.parts(), kv=kind), made(tiny.parts(), kv=kind, kv_budget="0"), []
    rows, candidates = rng.integers(0, 120, 17), rng.permutation(120)[:9]
    for length in (0, 1, 8, 12, 17):
        expected = rounded_scores(tiny, kind, rows[:length], candidates)
        plain = reference_scores(tiny, rows[:length], candidates)
        for each, user in ((cold, None), (engine, "a"), (engine, "a")):
            asked = {"history": tiny.ids(rows[:length]), "user_id": user}
            ranking = each.recommend(**asked, k=120, exclude_seen=False)
            ranked = each.recommend(**asked, candidates=tiny.ids(candidates), k=9)
            found = scores_of(ranking, tiny.item_ids), scores_of(ranked, tiny.ids(candidates))
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=ONE_STEP[kind], rtol=0)
        moved += [(ours - theirs).abs().max().item() for ours, theirs in zip(found, plain, strict=True)]
    assert max(moved) > 10 * ONE_STEP[kind]


@by_kind
def test_both_at_once_and_titles(kind):
    """Words too: text is never cached, but reads what is."""
    titled = make_titled()
    rows, named = list(range(7)), list(range(16, 24))
    asked = {"history": titled.ids(rows), "candidates": titled.ids(named), "k": 8, "head": "title"}
    weights, both = made(titled.parts(), weights=kind), made(titled.parts(), weights=kind, kv=kind)
    round_weights(titled.model.backbone, kind)
    expected = reference_title_scores(titled, rows, named)
    torch.testing.assert_close(scores_of(weights.recommend(**asked), titled.ids(named)), expected, atol=2e-3, rtol=1e-4)
    # the rounded weights in fp32, and only the cache in 8 bits
    other = made(titled.parts(), kv=kind)
    found, theirs = (scores_of(each.recommend(**asked), titled.ids(named)) for each in (both, other))
    torch.testing.assert_close(found, theirs, atol=2e-3, rtol=1e-4)
    assert (found - expected).abs().max() > 1e-2
    for length in (0, 3, 7):
        request = [Request(titled.ids(rows[:length]), user_id="a")]
        assert both.generate(request, max_tokens=8) == other.generate(request, max_tokens=8)


@by_kind
def test_weights_are_bytes_and_what_they_were_made_from_is_gone(kind):
    parts = make_tiny(family="qwen2").parts()
    linears = [module for module in parts.model.decoder.modules() if isinstance(module, nn.Linear)]
    held = [weakref.ref(linear.weight) for linear in linears]
    num_weights, num_outputs = sum(each().numel() for each in held), sum(linear.out_features for linear in linears)
    del linears
    engine = made(parts, weights=kind, dtype="bfloat16")
    gc.collect()
    assert not any(each() is not None for each in held)
    decoder = engine.model.decoder
    assert decoder.weight_kind == kind
    assert not any(isinstance(module, nn.Linear) for module in decoder.modules())
    small = {name: tensor for name, tensor in decoder.named_buffers() if name != "inv_freq"}
    assert sum(tensor.numel() * tensor.itemsize for tensor in small.values()) == num_weights + 4 * num_outputs
    assert {tensor.dtype.itemsize for name, tensor in small.items() if name.endswith("values")} == {1}
    assert decoder.layers[0].qkv.bias.dtype == torch.bfloat16
    pointers = [tensor.data_ptr() for tensor in small.values()]
    engine.recommend(["0001"], user_id="a")
    assert pointers == [tensor.data_ptr() for name, tensor in decoder.named_buffers() if name != "inv_freq"]


@by_kind
def test_weights_are_rounded_once_from_what_was_loaded(kind):
    """Not from their copy in bf16: two roundings are worse than one."""
    tiny = make_tiny()
    wide = tiny.model.backbone.layers[0].mlp.down_proj.weight
    engine = made(tiny.parts(), weights=kind, dtype="bfloat16")
    small = engine.model.decoder.layers[0].down.weight.dequantized()
    torch.testing.assert_close(small, rounded(wide.detach(), kind), atol=1e-7, rtol=1e-6)


def test_a_quantized_model_is_not_taken_for_another(tmp_path):
    parts = make_tiny().parts()
    ids = ["0001", "0002"]
    first = made(parts, weights="fp8").recommend(ids)
    assert made(parts, weights="fp8").recommend(ids) == first
    for settings in ({}, {"weights": "int8"}, {"cpu_path": "plain"}):
        with pytest.raises(ConfigError, match="weights='fp8' has quantized this model; read its directory again"):
            made(parts, **settings)
    with pytest.raises(ConfigError, match="save: an engine has quantized"):
        parts.save(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_quantized_as_it_is_read_and_reloaded(tmp_path):
    tiny = make_tiny()
    tiny.parts().save(tmp_path / "engine")
    settings = {"cpu_path": "torch", "dtype": "float32", "weights": "int8", "kv": "fp8"}
    engine = Engine.load(tmp_path / "engine", device="cpu", **settings)
    ids = tiny.ids(range(9))
    before = engine.recommend(ids, user_id="a")
    assert before == made(tiny.parts(), weights="int8", kv="fp8").recommend(ids)
    engine.reload(tmp_path / "engine")
    assert engine.recommend(ids, user_id="a") == before
    assert isinstance(engine.parts, EngineParts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", ["auto", *KINDS])
def test_the_budget_counts_every_byte(kv, dtype):
    engine = made(make_tiny().parts(), kv=kv, dtype=dtype, host_budget="100KB")
    cache, size = engine._now().cache, engine._now().cache.size
    layer = cache.layer(0)
    tensors = (layer.keys, layer.values, *(layer.scales or ()))
    assert len(tensors) == (2 if kv == "auto" else 4)
    position = 3 * sum(tensor.numel() * tensor.itemsize for tensor in tensors)  # of three layers
    kept = 48 * getattr(torch, dtype).itemsize  # h(last)
    assert size.block_bytes == position // size.num_blocks + kept
    assert size.budget == 4 * 2**20 // size.block_bytes
    assert size.host == 100_000 // size.block_bytes
    assert cache.host.numel() == size.host * (size.block_bytes - kept)
    assert engine.stats().kv_bytes == size.num_blocks * size.block_bytes
    # 8 elements of a head in 8 bytes and 4 of its scale: more heads fit into the same budget
    if kv != "auto" and dtype == "float32":
        assert size.block_bytes < made(make_tiny().parts(), dtype=dtype)._now().cache.size.block_bytes * 0.4


@by_kind
def test_sessions_come_back_from_the_host_with_their_scales(kind):
    """Bit for bit, moved and corrected; blocks are filled with junk when they are freed."""
    tiny, rng = make_tiny(window=20, step=4), np.random.default_rng(2)
    settings = {"kv": kind, "weights": kind, "block_size": 4}
    block = made(tiny.parts(), **settings)._now().cache.size.block_bytes
    moved = made(tiny.parts(), **settings, kv_budget=str(11 * block), host_budget="1MiB")
    cold = made(tiny.parts(), **settings, kv_budget="0")
    histories = [rng.integers(0, 120, rng.integers(1, 15)).tolist() for _ in range(12)]
    for _ in range(60):
        user = int(rng.integers(12))
        if rng.random() < 0.3:  # a corrected past: the block that holds it is copied
            histories[user][int(rng.integers(len(histories[user])))] = int(rng.integers(120))
        histories[user] = [*histories[user], int(rng.integers(120))][:24]
        asked = {"history": tiny.ids(histories[user]), "candidates": tiny.ids(range(5))}
        assert moved.recommend(**asked, user_id=f"u{user}") == cold.recommend(**asked)
        moved.check_integrity()
    counted = moved.stats()
    assert counted.blocks_offloaded > 0 and counted.blocks_restored > 0 and counted.blocks_copied > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int4"}, "weights: 'int4'; choose 'auto', 'int8' or 'fp8'"),
        ({"kv": "fp4"}, "kv: 'fp4'; choose 'auto', 'int8' or 'fp8'"),
        ({"weights": "fp8", "cpu_path": "plain"}, "weights: native kernels multiply no 'fp8'; choose 'int8', or set"),
        ({"kv": "fp8", "cpu_path": "plain"}, "kv: native kernels cache keys and values in dtype, not in 'fp8'; leave"),
        ({"kv": "int8", "cpu_path": "plain"}, "not in 'int8'; leave it at 'auto', or set cpu_path to 'torch'"),
    ],
)
def test_what_can_not_be_had_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        made(make_tiny().parts(), **settings)


def test_fp8_keys_want_a_gpu_that_knows_them(monkeypatch):
    ampere = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"kv: 'fp8' needs a GPU of compute capability 8\.9 or later; choose 'int8'"):
        pick_kv_dtype("fp8", ampere, torch.bfloat16)
    assert pick_kv_dtype("int8", ampere, torch.bfloat16) == torch.int8
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert pick_kv_dtype("fp8", ampere, torch.bfloat16) == torch.float8_e4m3fn
    assert pick_kv_dtype("auto", ampere, torch.bfloat16) == torch.bfloat16
