"""Triton's interpreter without what it does in vain: kernels take less than half the time, and give the same bits.

It adds and multiplies integers once more, in 64 bits, for an assertion that it makes only where it debugs; at every
call of a device function it replaces the language's functions by what stands there already; and it makes a table of
all types, a block's type and the constants of its shape anew for each value.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

REPLACED = (
    (interpreter.interpreter_builder, "options"),
    (interpreter, "_get_np_dtype"),
    (interpreter, "_patch_lang"),
    (interpreter._LangPatchScope, "restore"),
    (tl.block_type, "__init__"),
    (tl.tensor, "__init__"),
)
PLAIN = [getattr(owner, name) for owner, name in REPLACED]


def spare(patch: pytest.MonkeyPatch) -> None:
    options, types, lang, restore, block, _ = PLAIN
    assert not options.debug  # else the assertion is made
    no_assertion = interpreter.InterpreterOptions(sanitize_overflow=False)
    new = (no_assertion, _known_types(types), *_patch_once(lang, restore), _known_blocks(block), _known_shapes())
    for (owner, name), value in zip(REPLACED, new, strict=True):
        patch.setattr(owner, name, value)


def leave_plain(patch: pytest.MonkeyPatch) -> None:
    """As Triton has it."""
    for (owner, name), value in zip(REPLACED, PLAIN, strict=True):
        patch.setattr(owner, name, value)


def _patch_once(patch: Callable, restore: Callable) -> tuple[Callable, Callable]:
    """The language's functions are replaced at a launch and stay so until it has ended."""
    patched: set[str] = set()

    @cache
    def languages(function: Callable) -> frozenset[str]:
        return frozenset(each.__name__ for each in function.__globals__.values() if each is tl or each is tl.core)

    def patch_once(function: Callable) -> Any:
        found = languages(function)
        if found and found <= patched:
            return None  # a device function's call, which asks for nothing back
        patched.update(found)
        return patch(function)

    def restore_and_forget(scope: Any) -> None:
        patched.clear()
        restore(scope)

    return patch_once, restore_and_forget


def _known_types(find: Callable) -> Callable:
    of_scalar = cache(find)

    def known(kind: Any) -> np.dtype:
        scalar = kind.scalar
        return find(scalar) if scalar.is_ptr() else of_scalar(scalar)  # pointers can't be hashed

    return known


def _known_blocks(make: Callable) -> Callable:
    found: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def known(block: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(each.value if isinstance(each, tl.constexpr) else each for each in shape)
        if key in found:
            vars(block).update(found[key], element_ty=element_ty)
        else:
            make(block, element_ty, shape)
            found[key] = dict(vars(block))

    return known


def _known_shapes() -> Callable:
    @cache
    def constants(*shape: int) -> dict[str, Any]:
        of_shape = tl.tuple([tl.constexpr(each) for each in shape])
        return {"numel": tl.constexpr(math.prod(shape)), "shape": of_shape}

    def known(tensor: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else ()
        vars(tensor).update(constants(*shape), handle=handle, type=type, dtype=type.scalar)

    return known
