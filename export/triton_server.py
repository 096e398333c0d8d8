"""An engine directory -> a model repository of NVIDIA's Triton Inference Server: item ids in, ranked item ids out.

For every graph of `served_graph.py`: the graph itself (`recommend`), two Python steps around it (`recommend_encode`,
`recommend_decode`) and the ensemble that clients call (`recommend_items`).
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from speeder_engine.artifact import write_artifact
from speeder_engine.checks import given_path
from speeder_engine.config import PromptConfig
from speeder_engine.export.float8 import use_float8
from speeder_engine.export.graph_spec import GraphSpec
from speeder_engine.export.onnx_check import check_graph, check_model, load_onnx
from speeder_engine.export.onnx_config import OnnxConfig
from speeder_engine.export.onnx_engine import OnnxFiles
from speeder_engine.export.onnx_file import WeightsFile, write_graph
from speeder_engine.export.parity import MOST_K, PARITY_USERS, compare, describe, why_not_compared
from speeder_engine.export.plan_builder import PlanBuilder
from speeder_engine.export.plan_config import PlanConfig
from speeder_engine.export.served_engine import STANDS_FOR, ServedEngine
from speeder_engine.export.served_graph import served_specs
from speeder_engine.export.static_graph import StaticModel
from speeder_engine.export.tensorrt_package import check_installed, find_chip, load_tensorrt
from speeder_engine.export.to_tensorrt import plan_progress
from speeder_engine.export.tools import versions
from speeder_engine.export.triton_config import (
    TRITON,
    TritonConfig,
    Word,
    graph_config,
    model_file,
    queueing,
    render,
    tensor,
)
from speeder_engine.parts import EngineParts
from speeder_engine.progress import track

IDS_MODEL = Path(__file__).with_name("triton_ids.py")
VERSION = "1"  # of every model in a new repository


def export_triton(
    engine: str | Path, out: str | Path, config: TritonConfig, parity_users: int = PARITY_USERS
) -> dict[str, Any]:
    """Writes `out` in one step and returns its manifest. A killed export leaves nothing that loads.

    parity_users: random users for whom the graphs and the engine must agree, where ONNX Runtime is installed and runs
    them. Raises MissingDependency, ConfigError where tensorrt finds no GPU to build for, ExportError for a graph that
    is off or can't be built and ArtifactError for folders that can't be read or written.
    """
    out = given_path(out, "export", "a model repository")
    load_onnx()
    trt = None
    if config.backend == "tensorrt":
        check_installed("tensorrt", "Triton's tensorrt backend")
        find_chip("building with tensorrt")
        trt = load_tensorrt("tensorrt", "Triton's tensorrt backend")
    parts = EngineParts.load(engine)

    def fill(folder: Path) -> dict[str, Any]:
        model = StaticModel(parts, config.plans.graph_config)
        if config.dtype == "float8":
            use_float8(model)
        specs = served_specs(parts, model, config.graphs, config.k)
        models: list[str] = []
        graphs: dict[Path, GraphSpec] = {}
        for spec in track(specs, "tracing graphs"):
            models += _write_around(spec, folder, parts, config)
            graphs[_write_graph(spec, folder / spec.name / VERSION, config)] = spec
        parity = _compare(parts, config, graphs, parity_users)
        if trt is not None:
            _build_plans(trt, graphs, config.plans, parts)
        return _manifest(parts, config, specs, models, parity)

    return write_artifact(out, fill, TRITON).manifest


def _write_around(spec: GraphSpec, folder: Path, parts: EngineParts, config: TritonConfig) -> list[str]:
    """Everything but the graph itself; returns the models' names."""
    configs = repository_configs(spec, parts.config.prompt, config)
    for name, settings in configs.items():
        (folder / name / VERSION).mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(render(settings), encoding="utf-8")
    for name in (f"{spec.name}_encode", f"{spec.name}_decode"):
        _write_step(folder / name / VERSION, parts)
    # stores without folders would lose an empty one, which the server wants to see
    (folder / f"{spec.name}_items" / VERSION / ".keep").touch()
    return list(configs)


def _write_graph(spec: GraphSpec, place: Path, config: TritonConfig) -> Path:
    """Checked, and under the name that the server knows it by; what a plan is built from keeps its own."""
    onnx = config.plans.graph_config
    with WeightsFile(place) as weights:
        path = write_graph(spec, onnx.opset, weights)
    check_graph(path, onnx.flavour)
    check_model(path)
    return path.rename(place / model_file("onnxruntime")) if config.backend == "onnxruntime" else path


def _compare(
    parts: EngineParts, config: TritonConfig, graphs: Mapping[Path, GraphSpec], num_users: int
) -> dict[str, dict[str, Any] | str]:
    """Every graph with the engine, as the manifest says it. Raises ExportError where one is off."""
    why_not = why_not_compared(config.dtype, num_users)
    if why_not:
        return {spec.name: describe(None, why_not) for spec in graphs.values()}
    stands_for = {STANDS_FOR[spec.name]: spec.name for spec in graphs.values()}
    onnx = OnnxConfig(dtype=config.dtype, graphs=tuple(stands_for))
    files = OnnxFiles(next(iter(graphs)).parent, onnx, parts.config, parts.catalogue.table(), parts.revision)
    parity = compare(parts, ServedEngine(files, graphs), num_users, stands_for, min(config.k, MOST_K))
    return {name: describe(result, None) for name, result in parity.items()}


def _build_plans(trt: Any, graphs: Mapping[Path, GraphSpec], plans: PlanConfig, parts: EngineParts) -> None:
    """Plans in the place of the graphs, for the GPU that is there."""
    with plan_progress(len(graphs)) as step:
        builder = PlanBuilder(trt, None, step.note)
        for path, spec in graphs.items():
            step.begin(spec.name)
            plan = builder.build(path, spec.input_shapes, plans.limits(parts.config), None)
            place = path.parent
            shutil.rmtree(place)
            place.mkdir()
            (place / model_file("tensorrt")).write_bytes(memoryview(plan))


def _write_step(place: Path, parts: EngineParts) -> None:
    shutil.copyfile(IDS_MODEL, place / "model.py")
    ids = json.dumps(list(parts.catalogue.item_ids), ensure_ascii=False)
    (place / "item_ids.json").write_text(ids, encoding="utf-8")


def repository_configs(spec: GraphSpec, prompt: PromptConfig, config: TritonConfig) -> dict[str, dict[str, Any]]:
    """Settings of a graph, of the steps around it and of their ensemble, by the models' names."""
    make: list[Callable[[], dict[str, Any]]] = [
        lambda: graph_config(spec, config),
        lambda: _encode(spec, prompt, config),
        lambda: _decode(spec, prompt, config),
        lambda: _ensemble(spec, config),
    ]
    return {settings["name"]: settings for settings in (each() for each in make)}


def _settings(spec: GraphSpec, role: str, prompt: PromptConfig, config: TritonConfig) -> dict[str, Any]:
    """What the Python step reads of its config: Triton hands parameters over as strings."""
    settings: dict[str, Any] = {
        "role": role,
        "session": spec.name == "session",
        "window": prompt.window,
        "window_step": prompt.window_step,
        "most": {"history": prompt.window, "candidates": config.candidates[1], "excluded": config.excluded[1]},
    }
    if "buckets" in spec.inputs and prompt.calendar is not None:
        settings["calendar"] = prompt.calendar.to_json()
    return {"key": "settings", "value": {"string_value": json.dumps(settings)}}


def _python(name: str, config: TritonConfig) -> dict[str, Any]:
    instances = {"count": 1, "kind": Word("KIND_CPU")}
    return {"name": name, "backend": "python", "max_batch_size": config.batch[1], "instance_group": instances}


def ids_inputs(spec: GraphSpec) -> list[dict[str, Any]]:
    """What clients send: strings, "" where there is none."""
    names = [name for name in ("history", "candidates", "excluded") if name in spec.inputs]
    inputs = [tensor(name, "string", ["any"]) for name in names]
    return [*inputs, tensor("times", "float64", ["any"])] if "buckets" in spec.inputs else inputs


def encoded(spec: GraphSpec) -> dict[str, str]:
    """The encode step's outputs, and the inputs of the graph that they are."""
    names = {"history_rows": "history", "lengths": "lengths", "buckets": "buckets"}
    names |= {"candidate_rows": "candidates", "excluded_rows": "excluded"}
    return {output: name for output, name in names.items() if name in spec.inputs}


def _encode(spec: GraphSpec, prompt: PromptConfig, config: TritonConfig) -> dict[str, Any]:
    outputs = [tensor(name, "int64", [1] if name == "lengths" else ["any"]) for name in encoded(spec)]
    return {
        **_python(f"{spec.name}_encode", config),
        "input": ids_inputs(spec),
        "output": outputs,
        # the front door: what is not taken here has cost nothing; it takes requests one by one, so that none waits
        **queueing(config, 0),
        "parameters": _settings(spec, "encode", prompt, config),
    }


def _decode(spec: GraphSpec, prompt: PromptConfig, config: TritonConfig) -> dict[str, Any]:
    inputs = [tensor("rows", "int64", ["any"]), tensor("scores", "float32", ["any"])]
    if spec.name == "session":
        inputs += [tensor(name, "int64", [1]) for name in ("lengths", "total_lengths")]
    return {
        **_python(f"{spec.name}_decode", config),
        "input": inputs,
        "output": [tensor("item_ids", "string", ["any"]), tensor("item_scores", "float32", ["any"])],
        "parameters": _settings(spec, "decode", prompt, config),
    }


def _ensemble(spec: GraphSpec, config: TritonConfig) -> dict[str, Any]:
    inputs = ids_inputs(spec)
    graph_outputs = [name for name in ("rows", "scores", "candidate_scores", "total_lengths") if name in spec.outputs]
    names = {name: name for name in (each["name"] for each in inputs)}
    steps = [
        _step(f"{spec.name}_encode", names, {name: name for name in encoded(spec)}),
        _step(spec.name, {name: output for output, name in encoded(spec).items()}, {n: n for n in graph_outputs}),
        *_decode_steps(spec),
    ]
    outputs = [tensor(name, "string", ["any"]) for name in _answers(spec)]
    outputs += [tensor(name, "float32", ["any"]) for name in _answers(spec).values()]
    return {
        "name": f"{spec.name}_items",
        "platform": "ensemble",
        "max_batch_size": config.batch[1],
        "input": inputs,
        "output": outputs,
        "ensemble_scheduling": {"step": steps},
    }


def _answers(spec: GraphSpec) -> dict[str, str]:
    """The ensemble's item ids, and their scores."""
    answers = {"item_ids": "item_scores"}
    return answers | {"candidate_ids": "candidate_id_scores"} if spec.name == "session" else answers


def _decode_steps(spec: GraphSpec) -> list[dict[str, Any]]:
    """One of what was found; a session has one of its candidates too."""
    found = "rows" if "rows" in spec.outputs else "candidate_rows"
    pairs = [(found, "scores", "item_ids", "item_scores")]
    session = {}
    if spec.name == "session":
        pairs.append(("candidate_rows", "candidate_scores", "candidate_ids", "candidate_id_scores"))
        session = {"lengths": "lengths", "total_lengths": "total_lengths"}
    return [
        _step(f"{spec.name}_decode", {"rows": rows, "scores": scores, **session}, {"item_ids": ids, "item_scores": of})
        for rows, scores, ids, of in pairs
    ]


def _step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> dict[str, Any]:
    """inputs and outputs: the model's names -> the ensemble's."""
    return {
        "model_name": model,
        "model_version": -1,
        "input_map": [{"key": key, "value": value} for key, value in inputs.items()],
        "output_map": [{"key": key, "value": value} for key, value in outputs.items()],
    }


def _manifest(
    parts: EngineParts,
    config: TritonConfig,
    specs: list[GraphSpec],
    models: list[str],
    parity: Mapping[str, dict[str, Any] | str],
) -> dict[str, Any]:
    tools = ["speeder-engine", "torch", "onnx", *(["tensorrt"] if config.backend == "tensorrt" else [])]
    return {
        "engine_revision": parts.revision,
        "export": config.to_json(),
        "model": parts.config.to_json(),
        "limits": {"num_items": len(parts.catalogue), "window": parts.config.prompt.window},
        "models": models,
        "graphs": {
            spec.name: {
                "inputs": {name: list(shape) for name, shape in spec.input_shapes.items()},
                "outputs": {name: list(shape) for name, shape in spec.outputs.items()},
                "parity": parity[spec.name],
            }
            for spec in specs
        },
        "tools": versions(tools),
        "run": "built, not run",
    }
