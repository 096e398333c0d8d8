"""Versions in a manifest: of what is installed, and nothing of what is not."""

from importlib.metadata import version

from speeder_engine.export.tools import installed_version, versions


def test_what_is_not_installed_is_left_out():
    assert versions(("torch", "no-package-of-this-name")) == {"torch": version("torch")}
    assert installed_version("no-package-of-this-name") is None
