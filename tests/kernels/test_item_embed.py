"""Rows looked up, added and normed in one kernel, interpreted, against the reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, assert_as_near, huge

from speeder_engine.triton_kernels.item_embed import EmbedRows, EmbedTables, item_embed_ref, launch_item_embed

ITEMS, SLOTS, BUCKETS, WORDS = 9, 5, 4, 7


def make_tables(size, dtype, calendar=True, text=True):
    generator = torch.Generator().manual_seed(size)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return EmbedTables(
        draw(ITEMS, size),
        draw(SLOTS, size),
        draw(size),
        draw(size),
        1e-6,
        draw(BUCKETS, size) if calendar else None,
        draw(WORDS, size) if text else None,
    )


def make_rows(num_items, num_tokens, spare=3):
    generator = torch.Generator().manual_seed(num_items)

    def below(most, count):
        return torch.randint(0, most, (count,), generator=generator)

    tokens = None if num_tokens is None else below(WORDS, num_tokens)
    return EmbedRows(
        below(ITEMS, num_items),
        below(SLOTS, num_items),
        below(BUCKETS, num_items),
        below(2, num_items).bool(),
        tokens,
        num_items + (num_tokens or 0) + spare,
    )


def check(tables, rows):
    names = [name for name, value in vars(tables).items() if isinstance(value, torch.Tensor)]

    def reference(*tensors):
        return item_embed_ref(replace(tables, **dict(zip(names, tensors, strict=True))), rows)

    found = launch_item_embed(tables, rows)
    assert_as_near(found, reference, *(getattr(tables, name) for name in names), slack=4)
    assert not any(each[rows.num_rows :].any() for each in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "num_items", "num_tokens", "calendar"), [(24, 6, 4, True), (1, 1, None, False), (37, 0, 3, True)]
)
def test_equals_the_reference(size, num_items, num_tokens, calendar, dtype):
    check(make_tables(size, dtype, calendar, num_tokens is not None), make_rows(num_items, num_tokens))


def test_no_rows_at_all():
    found = launch_item_embed(make_tables(8, torch.float32), make_rows(0, None, spare=0))
    assert [each.shape for each in found] == [(0, 8), (0, 8)]


@pytest.mark.parametrize("small", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_table_is_scaled_by_row(small):
    tables = make_tables(24, torch.bfloat16)
    scale = torch.rand(ITEMS) + 0.01
    check(replace(tables, items=(tables.items.float() * 30).to(small), item_scale=scale), make_rows(6, 4))


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 50), st.integers(0, 5), st.sampled_from([None, 0, 3]), st.booleans())
def test_any_shape(size, num_items, num_tokens, calendar):
    check(make_tables(size, torch.float16, calendar), make_rows(num_items, num_tokens))


def test_rows_beyond_two_gigabytes():
    size, last = 64, 2**25 + 5
    table = huge(last + 1, size)
    table[last], table[3] = 7, -2
    tables = make_tables(size, torch.float32)
    rows = replace(make_rows(2, None), items=torch.tensor([last, 3], dtype=torch.int32))
    found, _ = launch_item_embed(replace(tables, items=table, item_scale=torch.ones(last + 1)), rows)
    plain, _ = item_embed_ref(replace(tables, items=torch.full((ITEMS, size), 7.0)), make_rows(2, None))
    assert torch.allclose(found[0], plain[0]) and torch.allclose(found[1], plain[1] - 9)
