"""What a run reports: a line of JSON an epoch, and the same as TensorBoard scalars where they are asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speeder_engine.errors import MissingDependency


class RunLog:
    """Records of epochs, appended to a JSONL file and to a TensorBoard folder; either may be None."""

    def __init__(self, path: Path | None = None, tensorboard: Path | None = None) -> None:
        self.path = path
        self.board = None if tensorboard is None else open_board(tensorboard)

    def write(self, record: Mapping[str, Any], epochs_done: int) -> None:
        """`epochs_done`: over all stages, the x of the scalars."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(dict(record)) + "\n")
        if self.board is not None:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, epochs_done)
            self.board.flush()


def open_board(folder: Path) -> Any:
    """A TensorBoard writer into `folder`; MissingDependency where the package isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependency("tensorboard", "tensorboard", "--tensorboard") from None
    return SummaryWriter(str(folder))
