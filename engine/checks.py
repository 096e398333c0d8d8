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
    """ConfigError for what is no path, or none that can be looked up. `where` names who asks in the message, `of` what
    the path should lead to; that it leads there is not asked."""
    try:
        found = Path(path)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{where}: expected the path of {of}, got {shown(path)}") from None
    try:
        found.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever reads or writes there has more to say
    except (OSError, ValueError) as error:  # too long, within a folder that is somebody else's, a zero byte in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{where}: {shown(str(path))}: {reason}; give the path of {of}") from None
    return found
