"""Mixture of modality experts: the kernels, interpreted, against the reference; the compressor's own test has the
formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, SLACK

from speeder_engine.config import CompressorConfig
from speeder_engine.models.compressor import Compressor
from speeder_engine.triton_kernels.modality_experts import (
    Affine,
    Mixture,
    launch_modality_experts,
    modality_experts,
    modality_experts_ref,
)

WIDTHS = {"text": 37, "image": 64, "collaborative": 9}


def make_case(num_items, size, widths, dtype, seed=0):
    torch.manual_seed(seed)
    compressor = Compressor(CompressorConfig(widths, size, temperature=0.7, scale=0.05)).requires_grad_(False)
    for parameter in compressor.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    features = [(torch.randn(num_items, width) * 3 + 1).to(dtype) for width in widths.values()]
    present = torch.rand(num_items, len(widths)) < 0.6
    present[:1] = False
    return features, present, compressor.to(dtype).mixture()


def wide(mixture):
    def cast(layer):
        return Affine(layer.weight.float(), layer.bias.float())

    lists = ([cast(layer) for layer in each] for each in (mixture.norms, mixture.ups, mixture.downs))
    rest = (mixture.fallback.float(), mixture.temperature, mixture.scale, mixture.eps)
    return Mixture(*lists, cast(mixture.gate), cast(mixture.norm), *rest)


def assert_near(features, present, mixture, share=None):
    found = launch_modality_experts(features, present, mixture, share)
    low = modality_experts_ref(features, present, mixture, share)
    exact = modality_experts_ref(
        [x.float() for x in features], present, wide(mixture), None if share is None else share.float()
    )
    for ours, theirs, best in zip(found, low, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if ours.numel():
            allowed = 2 * (theirs.float() - best).abs().max() + SLACK[ours.dtype] * best.abs().max()
            assert (ours.float() - best).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [None, (1.0, 0.5, 1.0), (1.0, 0.0, 0.0)])
def test_the_kernels_compute_the_same(dtype, share):
    case = make_case(19, 70, WIDTHS, dtype)
    assert_near(*case, None if share is None else torch.tensor(share, dtype=dtype))


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 33))
def test_any_shape(num_items, size, modalities, width):
    widths = {name: width + i for i, name in enumerate(list(WIDTHS)[:modalities])}
    assert_near(*make_case(num_items, size, widths, torch.float32))


def test_what_is_absent_is_not_read():
    features, present, mixture = make_case(6, 20, WIDTHS, torch.float32)
    expected = launch_modality_experts(features, present, mixture)
    for m, x in enumerate(features):
        x[~present[:, m]] = float("nan")
    found = launch_modality_experts(features, present, mixture)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.usefixtures("rows_alike")
def test_a_token_does_not_depend_on_its_company():
    features, present, mixture = make_case(18, 20, WIDTHS, torch.float32)
    together, _ = launch_modality_experts(features, present, mixture)
    for i in (0, 5, 17):
        alone, _ = launch_modality_experts([x[i : i + 1] for x in features], present[i : i + 1], mixture)
        assert torch.equal(alone[0], together[i])


def test_a_gradient_goes_through_the_reference():
    features, present, mixture = make_case(4, 8, WIDTHS, torch.float32)
    mixture.fallback.requires_grad_()
    modality_experts(features, present, mixture)[0].square().sum().backward()
    assert mixture.fallback.grad is not None
