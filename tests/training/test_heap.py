"""Freed memory stays with the process: touched again, it costs no page faults."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from speeder_engine.training.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
assert keep_freed_memory()
for _ in range(8):  # it takes some rounds until a hole fits
    faults()
print(usual, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_what_was_freed_is_taken_again_without_a_page_fault() -> None:
    usual_settings = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=usual_settings)
    usual, kept = map(int, ran.stdout.split())
    assert kept < usual / 20
