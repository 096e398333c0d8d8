"""What several rooms ask of values that strangers gave."""

from collections import Counter
from collections.abc import Iterable


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
