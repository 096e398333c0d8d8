"""A subject's ONNX exports, written once a process into a folder that goes with it."""

import os
import shutil
import tempfile
from pathlib import Path
from weakref import WeakKeyDictionary

from baselines.base import Unavailable
from subject import Subject

from speeder_engine.errors import MissingDependency
from speeder_engine.export import OnnxConfig, export_onnx

GRAPHS = ("score", "extend")
COPIES = 3  # of the weights in fp32 that exporting holds at a time
DISK_COPIES = 4  # the engine, two flavours, and what a runtime makes of them

_EXPORTS: "WeakKeyDictionary[Subject, Exports]" = WeakKeyDictionary()


class Exports:
    """Engine directory and ONNX exports in fp32 of one subject."""

    def __init__(self, subject: Subject) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="speeder-bench-", ignore_cleanup_errors=True)
        self.subject_bytes = 4 * sum(tensor.numel() for tensor in subject.weights.values())
        self.subject_bytes += 4 * subject.catalogue.tokens.numel()
        self.path = Path(self._folder.name)
        self._check_room()
        self._engine = self.path / "engine"
        subject.parts.save(self._engine)

    def onnx(self, flavour: str) -> Path:
        """The export with graphs for cold and returning users, in fp32, of this flavour."""
        out = self.path / flavour
        if not out.exists():
            try:
                export_onnx(self._engine, out, OnnxConfig(flavour, "float32", GRAPHS), parity_users=0)
            except MissingDependency as error:
                raise Unavailable(str(error)) from None
        return out

    def _check_room(self) -> None:
        free = shutil.disk_usage(self.path).free
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for what, have, copies in (("disk", free, DISK_COPIES), ("memory", memory, COPIES)):
            if have < copies * self.subject_bytes:
                needed = copies * self.subject_bytes / 2**30
                raise Unavailable(f"an ONNX export in fp32 needs {needed:.0f} GiB of {what}, {have / 2**30:.0f} are free")


def exports_of(subject: Subject) -> Exports:
    """Raises Unavailable where packages, disk or memory lack."""
    if subject not in _EXPORTS:
        _EXPORTS[subject] = Exports(subject)
    return _EXPORTS[subject]
