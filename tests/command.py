"""Commands as their user meets them, inside this process: a second import of torch takes seconds."""

import contextlib
import io
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from speeder_engine.cli import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that a failure says; AssertionError where it is none, or more."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        assert self.returncode == 1, f"ended with {self.returncode}: {self.stderr}"
        assert len(lines) == 1 and lines[0].startswith("error: "), self.stderr
        return lines[0]


def speeder(*arguments: object) -> Done:
    """What `speeder ARGUMENTS` prints and how it ends."""
    return _call(main, "speeder", *arguments)


def script(path: Path, *arguments: object) -> Done:
    """The same of a script, as `python PATH ARGUMENTS` runs it."""
    return _call(partial(runpy.run_path, str(path), run_name="__main__"), str(path), *arguments)


def _call(function: Callable[[], object], program: str, *arguments: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, _own_process():
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                function()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
    return Done(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _own_process() -> Iterator[None]:
    """Log and warnings as in a new process, and as they were here afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("speeder_engine")
    handlers, levels, environment = root.handlers, (root.level, ours.level), dict(os.environ)
    root.handlers = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        root.handlers = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
