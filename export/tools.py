"""Which versions of which packages an export was made with, as its manifest lists them."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """None where the package is not installed, if only as its sources stand on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    return {package: found for package in packages if (found := installed_version(package))}
