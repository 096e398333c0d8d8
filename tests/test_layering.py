"""The order of docs/architecture.md: a module imports only what stands to its left; some things only one room may."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ORDER = [
    "_C _cpu triton_kernels errors checks config request item progress files forks memory transfer live_prior"
    " runs followers following",
    "artifact catalogue device models encoders recommends",
    "checkpoint prompt title title_text",
    "query parts kv_blocks",
    "cache",
    "text_rows",
    "batch",
    "title_scorer embedder step_buffers native",
    "scorer",
    "scheduler runner session",
    "step",
    "generation graphs warm_up",
    "serving",
    "worker",
    "engine",
    "inspection bulk",
    "tables synthetic random_engine",
    "data",
    "evaluation",
    "training export",
    "demo",
    "cli",
]
TIER = {room: tier for tier, rooms in enumerate(ORDER) for room in rooms.split()}
# what the package's own names may be made of: up to the engine
TIER["__init__"] = TIER["engine"] + 1
MAPPED = {"engine": "", "triton_kernels": "triton_kernels.", "export": "export."}

ONLY = {
    "speeder_engine._C": "cache",
    "speeder_engine._cpu": "native",
    "triton": "triton_kernels",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "tensorrt": "export",
    "tensorrt_rtx": "export",
}
NOBODY = {"pandas", "pickle", "dill", "joblib"}
PICKLING = {"torch.save", "torch.load"}


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Every module's name inside the package, as `models.decoder`, and its file."""
    for folder, prefix in MAPPED.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            yield prefix + ".".join(parts), path


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported, wherever it stands; relative ones start with a dot."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                origin = "." * level + (module or "")
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]
            ):
                if called in ("import_module", "__import__"):
                    yield node.lineno, name


def complaint(module: str, name: str) -> str | None:
    """Why `module` must not import `name`; None if it may."""
    room = module.split(".")[0]
    if name.startswith("."):
        return f"relative import {name}: write it in full"
    top = name.split(".")[0]
    if top in NOBODY:
        return f"nothing here imports {top}"
    for owned, owner in ONLY.items():
        if f"{name}.".startswith(f"{owned}.") and room != owner:
            return f"only {owner} imports {owned}"
    if top != "speeder_engine":
        return None
    target = [*name.split("."), ""][1]
    if target not in TIER or target == "__init__":
        return f"{name}: import it from the module it is defined in, or give its room a place in ORDER"
    if target == room or TIER[target] < TIER[room] or TIER[target] == TIER[room] == 0:
        return None
    return f"{room} stands left of {target}, or beside it"


def complaints(module: str, source: str) -> list[str]:
    if module.split(".")[0] not in TIER:
        return [f"{module}: give it a place in ORDER"]
    tree = ast.parse(source)
    found = [f"{module}:{line}: {text}" for line, name in imported(tree) if (text := complaint(module, name))]
    pickled = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLING]
    return found + [f"{module}:{node.lineno}: {ast.unparse(node)} pickles: use safetensors" for node in pickled]


def includers_of_python(root: Path) -> list[str]:
    """Native sources that know Python, but for the bindings."""
    sources = [path for path in (root / "csrc").rglob("*") if path.is_file() and path.name != "bindings.cpp"]
    known = re.compile(r'#\s*include\s*[<"](pybind11|Python\.h|torch/extension)')
    return [path.name for path in sources if known.search(path.read_text())]


def test_every_module_keeps_the_order(root):
    found = [text for module, path in modules(root) for text in complaints(module, path.read_text(encoding="utf-8"))]
    assert found == []


def test_every_room_is_seen(root):
    seen = {module.split(".")[0] for module, _ in modules(root)}
    folders = {path.parent.name for path in (root / "engine").glob("*/__init__.py")}
    assert seen >= {"errors", "files", "artifact", "triton_kernels", "export", *folders}


def test_only_the_bindings_know_python(root):
    assert includers_of_python(root) == []
    assert (root / "csrc" / "bindings.cpp").is_file()


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("models.decoder", "from speeder_engine.cache import KVCache", "models stands left of cache"),
        ("cache", "import speeder_engine.engine", "cache stands left of engine"),
        (
            "scheduler",
            "def f():\n    from speeder_engine.runner import ModelRunner",
            "scheduler:2: scheduler stands left",
        ),
        ("batch", "if TYPE_CHECKING:\n    from speeder_engine.scorer import Scorer", "or beside it"),
        ("models.heads", "from speeder_engine.encoders.text import TextEncoder", "or beside it"),
        ("prompt", "from speeder_engine import runner", "prompt stands left of runner"),
        ("data.tables", "from speeder_engine import Engine", "import it from the module it is defined in"),
        ("data.tables", "import speeder_engine", "import it from the module it is defined in"),
        ("__init__", "from speeder_engine.cli import main", "__init__ stands left of cli"),
        ("models.heads", "from .decoder import Decoder", "relative import .decoder.Decoder"),
        ("engine", "from . import cache", "relative import"),
        ("engine", "from speeder_engine._C import BlockManager", "only cache imports speeder_engine._C"),
        ("engine", "from speeder_engine import _C", "only cache imports speeder_engine._C"),
        ("cache", "from speeder_engine import _cpu", "only native imports speeder_engine._cpu"),
        ("runner", "import triton.language as tl", "only triton_kernels imports triton"),
        ("runner", "from triton import jit", "only triton_kernels imports triton"),
        ("checkpoint", "import onnx", "only export imports onnx"),
        ("cli", "importlib.import_module('tensorrt')", "only export imports tensorrt"),
        ("cache", "import_module('speeder_engine.engine')", "cache stands left of engine"),
        ("data.tables", "import pandas as pd", "nothing here imports pandas"),
        ("checkpoint", "import torch\ntorch.save(1, 'x')", "checkpoint:2: torch.save pickles"),
        ("novelty", "", "novelty: give it a place in ORDER"),
        ("cli", "from speeder_engine.novelty import x", "give its room a place in ORDER"),
    ],
)
def test_a_breach_is_found(module, source, expected):
    (found,) = complaints(module, source)
    assert expected in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.decoder", "from speeder_engine.models.position import PositionPrompts"),
        ("config", "from speeder_engine.errors import ConfigError"),
        ("cache", "from speeder_engine._C import BlockManager"),
        ("triton_kernels.topk", "import triton\nimport torch"),
        ("export.to_onnx", "def f():\n    import onnx\n    import onnxruntime"),
        ("runner", "import tritonclient"),
        ("__init__", "from speeder_engine.engine import Engine"),
        ("cli", "def demo():\n    from speeder_engine.demo import run"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert complaints(module, source) == []


def test_a_native_breach_is_found(tmp_path):
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "bindings.cpp").write_text("#include <pybind11/pybind11.h>\n")
    (tmp_path / "csrc" / "cpu" / "bindings.cpp").write_text("#include <pybind11/pybind11.h>\n")
    (tmp_path / "csrc" / "cpu" / "linear.h").write_text("# include <pybind11/numpy.h>\n")
    assert includers_of_python(tmp_path) == ["linear.h"]
