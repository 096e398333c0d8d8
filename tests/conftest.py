"""What holds for every test: no network, no bars, few threads, kernels interpreted where there is no GPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# read when a kernel is decorated and when a hub client is imported: before anything of ours is
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# waiting threads that spin make a busy machine's tests ten times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["SPEEDER_PROGRESS"] = "0"

ROOT = Path(__file__).resolve().parent.parent

# the root's folders bear the names of other people's packages (triton_kernels)
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import pytest  # noqa: E402
import torch  # noqa: E402

# beside other workers one thread each, alone two
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_configure(config: pytest.Config) -> None:
    # a line in pyproject.toml would import the package before this file has run
    config.addinivalue_line("filterwarnings", "error::speeder_engine.errors.SpeederWarning")


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Threads that wait for one another by spinning make small steps a hundred times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, or a skip."""
    folder = Path(os.environ.get("SPEEDER_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there; set SPEEDER_DATA to its place")
    return folder
