"""What can go wrong, as types. Every message says what, where and what to do about it, in one line."""

from collections.abc import Iterable


class SpeederError(Exception):
    """The root of every error this package raises on purpose."""


class ConfigError(SpeederError, ValueError):
    """A setting is missing, unknown or out of range."""


class DataError(SpeederError, ValueError):
    """Input data can't be read as what it claims to be."""


class InvalidRequest(SpeederError, ValueError):
    """A request can't be answered as it stands; nothing was computed or cached."""


class UnknownItem(InvalidRequest):
    """Item ids that are not in the catalogue: `ids` names them all, the message the first few."""

    def __init__(self, ids: Iterable[str], where: str, remedy: str = "pass ids that are in engine.catalogue") -> None:
        self.ids, self.where, self.remedy = tuple(ids), where, remedy
        super().__init__(f"{where}: unknown item {name_some(self.ids)}; {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        # what it was made with, so that another process can make it
        return type(self), (self.ids, self.where, self.remedy)


class ArtifactError(SpeederError):
    """An engine directory or checkpoint is truncated, altered, foreign or incomplete; the message names the file."""


class ExportError(SpeederError):
    """An export is not what it should be (an operator that isn't known, answers that differ); nothing was written."""


class CacheExhausted(SpeederError):
    """The KV cache can't hold this step even with every idle session evicted; nothing was changed. Or it can't keep a
    session that was to be warm and pinned: it is not pinned then."""


class CatalogueFull(SpeederError):
    """The catalogue's fixed capacity can't take the new items; nothing was changed."""


class QueueFull(SpeederError):
    """As many requests as the engine may hold are waiting: this one was refused at once."""


class DeadlineExceeded(SpeederError, TimeoutError):
    """A request was still waiting when its deadline passed; nothing was computed for it."""


class EngineClosed(SpeederError):
    """The engine was closed, and with it its sessions and its queue."""


class MissingDependency(SpeederError, ImportError):
    """An optional package is needed: the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        self._made_with = package, extra, what
        super().__init__(f"{what} needs the package {package}: pip install 'speeder-engine[{extra}]'")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._made_with


class SpeederWarning(UserWarning):
    """Something was skipped, replaced or counted; the message gives the number and an example."""


def shown(value: object, longest: int = 100) -> str:
    """A stranger's `repr` for a message: in one line, and no longer than that."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"{type(value).__name__} of thousands of digits"
    return text if len(text) <= longest else f"{text[:longest]}..."


def name_some(ids: Iterable[str], limit: int = 5) -> str:
    """`'a', 'b', 'c' (and 7 more)`: ids for a message."""
    named = list(ids)
    rest = len(named) - limit
    return ", ".join(map(shown, named[:limit])) + (f" (and {rest} more)" if rest > 0 else "")
