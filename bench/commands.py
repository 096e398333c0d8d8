"""How the scripts here are told what to do, and how they end."""

import sys
from collections.abc import Callable
from pathlib import Path

from speeder_engine.errors import SpeederError


def run_command(main: Callable[[], None]) -> None:
    """Bad input ends in one line that says what to do, and status 1."""
    try:
        main()
    except SpeederError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def listed(text: str) -> list[str]:
    """The names of an option such as 'searches; steps 7b'."""
    return [name.strip() for name in text.split(";") if name.strip()]
