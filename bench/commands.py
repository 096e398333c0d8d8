"""How the scripts here are told what to do, and how they end."""

import os
import sys
from collections.abc import Callable, Iterable
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

from speeder_engine.errors import ConfigError, SpeederError


def run_command(main: Callable[[], None]) -> None:
    """Bad input ends in one line that says what to do, and status 1."""
    try:
        main()
    except SpeederError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def listed(text: str, separator: str = ";") -> list[str]:
    """The names of an option such as 'searches; steps 7b'."""
    return [name.strip() for name in text.split(separator) if name.strip()]


def refuse_unknown(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """ConfigError for a name that nothing bears: a misspelt one would leave out what was meant."""
    known = list(dict.fromkeys(known))
    if strange := [name for name in given if name not in known]:
        raise ConfigError(f"{option}: no {', '.join(strange)}; there are {', '.join(known)}")


def end_with_parent() -> None:
    """What a spawned worker begins with: it would go on for nobody, once the process it works for is killed."""

    def wait(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if (parent := parent_process()) is not None:
        Thread(target=wait, args=(parent,), name="end with parent", daemon=True).start()
