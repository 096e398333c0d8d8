"""A subject's ONNX export, written once a process into a folder that goes with it."""

import re
import shutil
import tempfile
from pathlib import Path
from weakref import WeakKeyDictionary

from baselines.base import Unavailable
from subject import Subject

from speeder_engine.export import OnnxConfig, export_onnx

# one graph answers strangers (nothing is past) and those who return; it takes minutes to trace a large model
CONFIG = OnnxConfig("standard", "float32", ("extend",))
COPIES = 3  # of the weights in fp32, that exporting holds in memory, and that engine and export take on the disk

_EXPORTS: "WeakKeyDictionary[Subject, Export]" = WeakKeyDictionary()


class Export:
    """Engine directory and ONNX export in fp32 of one subject, in a temporary folder."""

    def __init__(self, subject: Subject) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="speeder-bench-", ignore_cleanup_errors=True)
        tensors = [*subject.weights.values(), subject.catalogue.tokens]
        self.num_bytes = 4 * sum(tensor.numel() for tensor in tensors)
        self._check_room(Path(self._folder.name))
        engine, self.path = (Path(self._folder.name, name) for name in ("engine", "onnx"))
        subject.parts.save(engine)
        export_onnx(engine, self.path, CONFIG, parity_users=0)

    def _check_room(self, folder: Path) -> None:
        needed = COPIES * self.num_bytes
        for what, free in (("disk", shutil.disk_usage(folder).free), ("memory", available_memory())):
            if free < needed:
                sizes = f"{needed / 2**30:.1f} GiB of {what}, {free / 2**30:.1f} are free"
                raise Unavailable(f"an ONNX export in fp32 needs {sizes}")


def available_memory() -> int:
    """Bytes that a process can have, the kernel's caches counted in."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None, "Linux has told this since 3.14"
    return int(found[1]) * 1024


def export_of(subject: Subject) -> Path:
    """The ONNX export. Raises Unavailable where disk or memory lack, MissingDependency where packages do."""
    if subject not in _EXPORTS:
        _EXPORTS[subject] = Export(subject)
    return _EXPORTS[subject].path
