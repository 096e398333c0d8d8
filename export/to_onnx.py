"""An engine directory -> an ONNX export: graphs are written, checked and compared with the engine, then published."""

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speeder_engine.artifact import write_artifact
from speeder_engine.checks import given_path
from speeder_engine.errors import MissingDependency
from speeder_engine.export.graph_spec import GraphSpec, cache_names, dtype_name, graph_specs
from speeder_engine.export.onnx_check import check_graph, check_model, load_onnx
from speeder_engine.export.onnx_config import INSTRUCTION_FILE, ONNX, OnnxConfig
from speeder_engine.export.onnx_file import WeightsFile, write_graph
from speeder_engine.export.onnx_session import load_runtime
from speeder_engine.export.parity import BOUNDS, PARITY_USERS, compare_files, describe, why_not_compared
from speeder_engine.export.static_graph import run_instruction
from speeder_engine.export.tools import versions
from speeder_engine.parts import EngineParts
from speeder_engine.progress import track

TOOLS = ("speeder-engine", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


@dataclass(frozen=True)
class WrittenGraph:
    spec: GraphSpec
    seconds: float  # of a processor
    size: int  # of the .onnx file, weights aside


def export_onnx(
    engine: str | Path, out: str | Path, config: OnnxConfig, parity_users: int = PARITY_USERS
) -> dict[str, Any]:
    """Writes `out` in one step and returns its manifest; whatever fails or is killed leaves nothing that loads.

    parity_users: random users for whom export and engine must agree (ExportError); 0 leaves that out, and so does
    bfloat16, which ONNX Runtime can't run on a CPU. Raises MissingDependency, ArtifactError, ConfigError.
    """
    out = given_path(out, "export", "an ONNX export")
    compared = parity_users > 0 and config.dtype in BOUNDS
    _check_tools(compared)
    why_not = why_not_compared(config.dtype, parity_users)
    parts = EngineParts.load(engine)

    def fill(folder: Path) -> dict[str, Any]:
        written = _write_graphs(parts, config, folder)
        if config.has_instruction:
            _write_instruction(parts, config, folder)
        parts.catalogue.table().save(folder)
        found = {} if why_not else compare_files(parts, config, folder, parity_users)
        parity = {name: describe(found.get(name), why_not) for name in config.graphs}
        return _manifest(parts, config, written, parity)

    return write_artifact(out, fill, ONNX).manifest


def _check_tools(compare: bool) -> None:
    load_onnx()
    try:
        import onnxscript  # noqa: F401  what torch's exporter needs
    except ImportError as error:
        raise MissingDependency("onnxscript", "export", "ONNX export") from error
    if compare:
        load_runtime("cpu")


def _write_graphs(parts: EngineParts, config: OnnxConfig, folder: Path) -> list[WrittenGraph]:
    written = []
    with WeightsFile(folder) as weights:
        for spec in track(graph_specs(parts, config), "tracing graphs", total=len(config.graphs)):
            started = time.process_time()
            path = write_graph(spec, config.opset, weights)
            written.append(WrittenGraph(spec, time.process_time() - started, path.stat().st_size))
    for name in config.graphs:
        path = folder / f"{name}.onnx"
        check_graph(path, config.flavour)
        check_model(path)
    return written


def _write_instruction(parts: EngineParts, config: OnnxConfig, folder: Path) -> None:
    """[1, H_kv, m, D] of every layer, by the names of the inputs they are the beginning of."""
    from safetensors.torch import save_file

    pairs = run_instruction(parts.model.decoder, parts.model.instruction).pairs
    names = cache_names("past_key_values", len(pairs))
    tensors = [part[None].to(config.torch_dtype).contiguous() for pair in pairs for part in pair]
    save_file(dict(zip(names, tensors, strict=True)), folder / INSTRUCTION_FILE)


def _manifest(
    parts: EngineParts, config: OnnxConfig, written: list[WrittenGraph], parity: dict[str, dict[str, Any] | str]
) -> dict[str, Any]:
    decoder, prompt = parts.config.decoder, parts.config.prompt
    return {
        "engine_revision": parts.revision,
        "export": config.to_json(),
        "model": parts.config.to_json(),
        "tools": versions(TOOLS) | {"python": platform.python_version()},
        "limits": {
            "num_items": parts.catalogue.num_rows,
            "window": prompt.window,
            "window_step": prompt.window_step,
            "instruction_len": len(prompt.instruction_ids),
            # how many positions of past keys and values stand before the history's first
            "past_begins_at": len(prompt.instruction_ids) if config.flavour == "ort" else 0,
            "num_layers": decoder.num_layers,
            "num_kv_heads": decoder.num_kv_heads,
            "head_dim": decoder.head_dim,
            "batch": "any; extend takes one user at a time" if config.flavour == "ort" else "any",
        },
        "providers": _providers(config),
        "graphs": {each.spec.name: _describe(each, parity[each.spec.name]) for each in written},
    }


def _providers(config: OnnxConfig) -> list[str]:
    """Where the files can run, as `OnnxEngine.load` names it."""
    providers = ["cuda"] if config.dtype == "bfloat16" else ["cpu", "cuda"]
    return [*providers, "tensorrt"] if config.flavour == "standard" else providers


def _describe(graph: WrittenGraph, parity: dict[str, Any] | str) -> dict[str, Any]:
    spec = graph.spec
    inputs = [
        {
            "name": name,
            "dtype": dtype_name(spec.inputs[name]),
            "shape": list(shape),
            "has_default": name in spec.defaults,
        }
        for name, shape in spec.input_shapes.items()
    ]
    return {
        "file": f"{spec.name}.onnx",
        "inputs": inputs,
        "outputs": [{"name": name, "shape": list(dims)} for name, dims in spec.outputs.items()],
        "export_cpu_seconds": round(graph.seconds, 2),
        "graph_bytes": graph.size,
        "parity": parity,
    }
