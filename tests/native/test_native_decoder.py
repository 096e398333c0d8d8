"""Whole native passes against transformers: all families and instruction sets, histories, candidates, trees of text."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from speeder_engine import _cpu
from speeder_engine.models.decoder import Decoder
from speeder_engine.models.families import FAMILIES
from speeder_engine.native.decoder import NativeDecoder, NativeRows, OwnKeys

KERNELS = [name for name in ("avx512", "avx2", "plain") if _cpu.has_kernels(name)]
BLOCK, BLOCKS = 4, 32
quick = settings(deadline=None, max_examples=25, database=None)
by_kernels = pytest.mark.parametrize("isa", KERNELS)
FP32 = 3e-5  # of the largest hidden state, about 3 under a norm


def make(family="qwen2", seed=0, heads=(6, 2, 10), hidden=48, intermediate=37, layers=3):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=50,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        intermediate_size=intermediate,
        max_position_embeddings=256,
        **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {}),
    )
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # smaller in wider models, as where they are trained: fp32 must tell the logits apart
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=min(0.2, 1.4 * hidden**-0.5))
    return model


def make_cache(model, dtype=torch.float32):
    config = model.config
    shape = (config.num_hidden_layers, BLOCKS, BLOCK, config.num_key_value_heads, config.head_dim)
    return SimpleNamespace(
        keys=torch.full(shape, 3e4, dtype=dtype), values=torch.full(shape, 3e4, dtype=dtype), block_size=BLOCK
    )


def native(model, isa=KERNELS[0], dtype=torch.float32, weights="auto"):
    return NativeDecoder(Decoder.from_transformers(model), dtype, weights, isa)


def make_rows(
    model, positions, *, slots=(), visible, sequence=None, candidate=None, tables, shared=(), shared_len=0, **more
):
    length = len(positions)
    cos, sin = Decoder.from_transformers(model).rotary(torch.arange(256))
    return NativeRows(
        positions=torch.tensor(positions),
        cos=cos,
        sin=sin,
        slot_mapping=torch.tensor(slots, dtype=torch.long),
        sequence=torch.zeros(length, dtype=torch.long) if sequence is None else torch.tensor(sequence),
        visible=torch.tensor(visible),
        candidate=torch.zeros(length, dtype=torch.bool) if candidate is None else torch.tensor(candidate),
        block_tables=torch.tensor(tables),
        shared_blocks=torch.tensor(shared, dtype=torch.long),
        shared_len=shared_len,
        **{"read_rows": torch.arange(length)} | more,
    )


def history_rows(model, length, first_block=1, **more):
    blocks = list(range(first_block, first_block + -(-length // BLOCK)))
    slots = [blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(length)]
    return make_rows(
        model, list(range(length)), slots=slots, visible=[i + 1 for i in range(length)], tables=[blocks], **more
    )


@torch.no_grad()
def expected(model, embedded, mask=None, positions=None):
    length = embedded.shape[0]
    mask = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    positions = torch.arange(length) if positions is None else torch.tensor(positions)
    out = model(inputs_embeds=embedded[None], attention_mask=mask[None, None], position_ids=positions[None])
    return out.last_hidden_state[0]


@by_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_a_history_equals_transformers(family, isa):
    model = make(family)
    embedded = torch.randn(37, 48)
    found = native(model, isa).forward(embedded, history_rows(model, 37), make_cache(model))
    torch.testing.assert_close(found, expected(model, embedded), atol=FP32, rtol=FP32)


@quick
@given(
    st.sampled_from(FAMILIES),
    st.sampled_from(KERNELS),
    st.sampled_from([(1, 1, 6), (2, 1, 48), (4, 4, 16), (9, 3, 20), (7, 1, 64)]),
    st.sampled_from([5, 12, 32]),
    st.sampled_from([5, 37, 80]),
    st.integers(1, 40),
    st.integers(0, 1000),
)
def test_random_shapes_equal_transformers(family, isa, heads, width, intermediate, length, seed):
    hidden = heads[0] * width
    model = make(family, seed, heads, hidden, intermediate, layers=2)
    embedded = torch.randn(length, hidden)
    found = native(model, isa).forward(embedded, history_rows(model, length), make_cache(model))
    torch.testing.assert_close(found, expected(model, embedded), atol=2 * FP32, rtol=2 * FP32)


@by_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_as_transformers(family, isa):
    model = make(family)
    embedded = torch.randn(37, 48).bfloat16()
    low = model.bfloat16()
    exact = expected(make(family).bfloat16().float(), embedded.float())
    found = native(low, isa, torch.bfloat16).forward(embedded, history_rows(low, 37), make_cache(low, torch.bfloat16))
    theirs = (expected(low, embedded).float() - exact).abs().mean()
    assert (found.float() - exact).abs().mean() <= 1.1 * theirs


@by_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_errors_are_its_rounding(isa, dtype):
    model = make()
    embedded = torch.randn(37, 48)
    exact = expected(model, embedded)
    run = native(model.to(dtype), isa, dtype, "int8")
    found = run.forward(embedded.to(dtype), history_rows(model, 37), make_cache(model, dtype))
    assert run.weight_bytes < native(model, isa, dtype).weight_bytes / 1.9
    error = (found.float() - exact).norm() / exact.norm()
    assert error < 0.05  # 4 linears x 3 layers, each rounded to 1 of 127 twice


def candidates_case(model, num_candidates=5, history=11, shared=6):
    """[shared | history | candidates], the history's first 4 cached by an earlier pass."""
    embedded = torch.randn(shared + history + num_candidates, 48)
    prefix = shared + history
    mask = torch.ones(len(embedded), len(embedded), dtype=torch.bool).tril()
    mask[prefix:, prefix:] = torch.eye(num_candidates, dtype=torch.bool)
    positions = [*range(prefix), *[prefix] * num_candidates]
    return embedded, mask, positions


@by_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_see_prefix_and_themselves(family, isa):
    model = make(family)
    run, cache = native(model, isa), make_cache(model)
    embedded, mask, positions = candidates_case(model)
    run.forward(embedded[:6], history_rows(model, 6, first_block=20), cache)
    tables, slots = [[3, 9, 5]], [3 * 4, 3 * 4 + 1, 3 * 4 + 2, 3 * 4 + 3, 36, 37, 38, 39, 20, 21, 22]
    shared = {"shared": [20, 21], "shared_len": 6}
    first = make_rows(model, range(6, 10), slots=slots[:4], visible=[1, 2, 3, 4], tables=tables, **shared)
    run.forward(embedded[6:10], first, cache)
    rest = make_rows(
        model,
        positions[10:],
        slots=[*slots[4:], *[-1] * 5],
        visible=[*range(5, 12), *[11] * 5],
        candidate=[*[False] * 7, *[True] * 5],
        tables=tables,
        **shared,
    )
    kept = cache.keys.clone()
    found = run.forward(embedded[10:], rest, cache)
    torch.testing.assert_close(found, expected(model, embedded, mask, positions)[10:], atol=FP32, rtol=FP32)
    written = (cache.keys != kept).any(dim=(0, 3, 4)).flatten().nonzero().flatten().tolist()
    assert written == sorted(slots[4:])  # candidates leave nothing behind


@by_kernels
def test_only_read_rows_are_answered_and_they_are_the_same(isa):
    model = make()
    run, cache = native(model, isa), make_cache(model)
    embedded = torch.randn(23, 48)
    whole = run.forward(embedded, history_rows(model, 23), cache)
    for reads in ([22], [0, 5, 22], []):
        rows = history_rows(model, 23, read_rows=torch.tensor(reads, dtype=torch.long))
        assert torch.equal(run.forward(embedded, rows, cache), whole[reads])


def tree_case(model):
    """A history of five, behind it a tree: two roots, each with two children."""
    embedded = torch.randn(5 + 6, 48)
    paths = [[0, -1], [1, -1], [0, 2], [0, 3], [1, 4], [1, 5]]
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    mask[5:, 5:] = False
    for row, path in enumerate(paths):
        mask[5 + row, [5 + each for each in path if each >= 0]] = True
    depths = [5, 5, 6, 6, 6, 6]
    return embedded, mask, paths, depths


@by_kernels
def test_text_sees_its_path(isa):
    model = make("qwen3")
    embedded, mask, paths, depths = tree_case(model)
    rows = make_rows(
        model,
        [*range(5), *depths],
        slots=[4, 5, 6, 7, 8],
        visible=[1, 2, 3, 4, 5, *[5] * 6],
        tables=[[1, 2]],
        paths=torch.tensor([[each + 5 if each >= 0 else -1 for each in path] for path in paths]),
    )
    found = native(model, isa).forward(embedded, rows, make_cache(model))
    wanted = expected(model, embedded, mask, [*range(5), *depths])
    torch.testing.assert_close(found, wanted, atol=FP32, rtol=FP32)


@by_kernels
def test_own_keys_are_kept_from_call_to_call(isa):
    """Tokens written one after the other, their keys in a scratch of the caller's."""
    model = make("qwen3")
    run, cache = native(model, isa), make_cache(model)
    embedded = torch.randn(9, 48)
    run.forward(embedded[:5], history_rows(model, 5), cache)
    scratch = [torch.zeros(3, 7, 2, 10) for _ in range(2)]
    found = []
    for step in range(4):
        rows = make_rows(
            model,
            [5 + step],
            visible=[5],
            tables=[[1, 2]],
            paths=torch.tensor([[2 + each if each <= step else -1 for each in range(4)]]),
            own=OwnKeys(torch.tensor([2 + step]), *scratch),
        )
        found.append(run.forward(embedded[5 + step : 6 + step], rows, cache))
    torch.testing.assert_close(torch.cat(found), expected(model, embedded)[5:], atol=FP32, rtol=FP32)


@by_kernels
def test_what_a_large_pass_needed_is_given_back(isa):
    model = make("qwen3")
    decoder = Decoder.from_transformers(model)
    run, cache = NativeDecoder(decoder, torch.float32, "auto", isa, kept_rows=8), make_cache(model)
    embedded = torch.randn(9, 48)
    before = run.forward(embedded[:8], history_rows(model, 8), cache)
    kept = run.scratch_bytes
    assert kept > 0
    run.forward(embedded, history_rows(model, 9), cache)
    assert run.scratch_bytes == 0
    assert torch.equal(run.forward(embedded[:8], history_rows(model, 8), cache), before)
    assert run.scratch_bytes == kept


@by_kernels
@pytest.mark.parametrize(("dtype", "weights"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")])
def test_a_sequence_is_bitwise_the_same_in_any_company(isa, dtype, weights):
    """Several histories in one pass, each alone, and with other numbers of threads."""
    kind = getattr(torch, dtype)
    model = make(heads=(6, 2, 16)).to(kind)
    run, cache = native(model, isa, kind, weights), make_cache(model, kind)
    run._native.work_per_thread = 1.0
    lengths, blocks = [1, 17, 40, 3], [[1], [2, 3, 4, 5, 6], list(range(7, 17)), [17]]
    parts = [torch.randn(length, 48).to(kind) for length in lengths]
    tables = [each + [0] * (10 - len(each)) for each in blocks]
    each = lambda make_one: [make_one(b, i) for b, n in enumerate(lengths) for i in range(n)]  # noqa: E731
    rows = make_rows(
        model,
        each(lambda _, i: i),
        slots=each(lambda b, i: blocks[b][i // BLOCK] * BLOCK + i % BLOCK),
        visible=each(lambda _, i: i + 1),
        sequence=each(lambda b, _: b),
        tables=tables,
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = run.forward(torch.cat(parts), rows, cache).split(lengths)
        torch.set_num_threads(1)
        for part, found in zip(parts, together, strict=True):
            alone = run.forward(part, history_rows(model, len(part)), make_cache(model, kind))
            assert torch.equal(alone, found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": [0, 1, -1]}, "positions: beyond"),
        ({"positions": [0, 1, 1 << 20]}, "positions: beyond"),
        ({"sequence": [0, 0, 1]}, "sequence: beyond"),
        ({"visible": [1, 2, 5]}, "visible: more than"),
        ({"slots": [4, 5, 4 * BLOCKS]}, "slot_mapping: beyond"),
        ({"tables": [[BLOCKS]]}, "block_tables: beyond"),
        ({"shared": [-1], "shared_len": 2}, "shared_blocks: beyond"),
        ({"paths": torch.tensor([[3]])}, "paths: out of range"),
        ({"read_rows": torch.tensor([3])}, "read_rows: out of range"),
    ],
)
def test_indices_that_point_nowhere_are_refused(change, message):
    model = make()
    cache = make_cache(model)
    kept = cache.keys.clone()
    settings = {"positions": [0, 1, 2], "slots": [4, 5, 6], "visible": [1, 2, 3], "tables": [[1]]} | change
    with pytest.raises(ValueError, match=message):
        native(model).forward(torch.randn(3, 48), make_rows(model, **settings), cache)
    assert torch.equal(cache.keys, kept)
