"""What a run reports: a line of JSON an epoch, and the same as TensorBoard scalars where they are asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speeder_engine.errors import MissingDependency
from speeder_engine.files import write_atomic


class RunLog:
    """Records of epochs, appended to a JSONL file and to a TensorBoard folder; either may be None. A context, in which
    the folder is open."""

    def __init__(self, path: Path | None = None, tensorboard: Path | None = None) -> None:
        self.path, self.tensorboard = path, tensorboard
        self.board: Any = None if tensorboard is None else open_board(tensorboard)
        self._replaces = False

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()

    def begin_anew(self) -> None:
        """The next line replaces what another run has left there: until then its checkpoint stands beside its log."""
        self._replaces = True

    def rewind(self, epochs_done: int) -> None:
        """Drops what stands beyond so many epochs: a run that was stopped between an epoch's line and its checkpoint
        trains that epoch again."""
        if self.path is not None and self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            # the record of an untrained model that goes on learning counts for no epoch
            untrained = bool(lines) and json.loads(lines[0])["epoch"] == 0
            write_atomic(self.path, "".join(lines[: epochs_done + untrained]).encode())
        if self.tensorboard is not None:
            self.board.close()
            self.board = open_board(self.tensorboard, beyond=epochs_done)

    def write(self, record: Mapping[str, Any], epochs_done: int) -> None:
        """`epochs_done`: over all stages, the x of the scalars."""
        line = json.dumps(dict(record)) + "\n"
        if self.path is not None and self._replaces:
            write_atomic(self.path, line.encode())
            self._replaces = False
        elif self.path is not None:
            with self.path.open("a") as file:
                file.write(line)
        if self.board is not None:
            for name, value in record.items():
                parts = {f"{name}/{part}": each for part, each in value.items()} if isinstance(value, dict) else {}
                for each, scalar in (parts or {name: value}).items():
                    if isinstance(scalar, int | float):
                        self.board.add_scalar(each, scalar, epochs_done)
            self.board.flush()


def open_board(folder: Path, beyond: int | None = None) -> Any:
    """A TensorBoard writer into `folder`, which hides what was written for steps past `beyond`; MissingDependency where
    the package isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependency("tensorboard", "tensorboard", "--tensorboard") from None
    return SummaryWriter(str(folder), purge_step=None if beyond is None else beyond + 1)
