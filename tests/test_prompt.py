"""The window's start against a simulation, and what follows from it."""

from hypothesis import given
from hypothesis import strategies as st
from reference import reference_start

from speeder_engine.config import PromptConfig
from speeder_engine.prompt import PromptLayout


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 400))
def test_the_window_slides_in_whole_steps(window, step, length):
    step = min(step, window)
    layout = PromptLayout(PromptConfig("x", (1, 2, 3), window, step))
    assert layout.start(length) == reference_start(length, window, step)
    window_len = length - layout.start(length)
    assert window_len <= window
    assert length <= window or window_len > window - step
