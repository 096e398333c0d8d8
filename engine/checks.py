"""What several rooms ask of values that strangers gave."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from speeder_engine.errors import ConfigError, shown

# the year 5138 in seconds, but 1973 in milliseconds
LATEST_SECOND = 10**11


def repeated(ids: Iterable[str]) -> list[str]:
    """Those that are named more than once, each once, in order."""
    return [item_id for item_id, count in Counter(ids).items() if count > 1]


def is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON's and YAML's escapes can spell, but no file can be written with."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def given_path(path: object, where: str, of: str) -> Path:
    """ConfigError for what is no path. `where` names who asks in the message, `of` what the path should lead to."""
    try:
        return Path(path)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{where}: expected the path of {of}, got {shown(path)}") from None
