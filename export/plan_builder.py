"""A graph -> a TensorRT plan. One builder a module, tensorrt or tensorrt_rtx: their calls are the same.

Networks are strongly typed: a plan computes in the types of the graph, nothing is rounded further behind our back.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from speeder_engine.errors import ExportError, SpeederWarning
from speeder_engine.export.onnx_check import read_graph

Shapes = Mapping[str, tuple[int | str, ...]]  # input -> its dimensions, numbers or names of `limits`
Limits = Mapping[str, tuple[int, ...]]  # dimension -> least, typical, most


class PlanBuilder:
    """Builds plans of graphs, for one chip each. `note` hears what the builder is at."""

    def __init__(self, trt: Any, timing_cache: bytes | None, note: Callable[[str], None]) -> None:
        self.trt = trt
        self.logger = make_logger(trt)
        self.builder = trt.Builder(self.logger)
        self.timing_cache = timing_cache
        self.monitor = make_monitor(trt, note)

    def build(self, graph: Path, shapes: Shapes, limits: Limits, chip: int | None) -> Any:
        """The plan's bytes; `chip` None: for the GPU that is there. Raises ExportError with the builder's own words."""
        network, parser = self._parse(graph)
        config = self.builder.create_builder_config()
        config.progress_monitor = self.monitor
        config.add_optimization_profile(self._profile(network, shapes, limits))
        if chip is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self.trt.ComputeCapability, f"SM{chip}"), 0)
        cache = None if self.timing_cache is None else self._attach_cache(config)
        plan = self.builder.build_serialized_network(network, config)
        # the network reads its weights from what the parser holds, the builder what it measures from the cache
        del parser, cache
        if self.monitor.interrupted:
            raise KeyboardInterrupt
        if plan is None:
            where = f"SM {chip}" if chip is not None else "this GPU"
            raise ExportError(f"{graph.stem}: TensorRT can't build it for {where}: {self.logger.last_error}")
        measured = config.get_timing_cache() if self.timing_cache is not None else None
        if measured is not None:
            self.timing_cache = bytes(measured.serialize())
        return plan

    def _attach_cache(self, config: Any) -> Any:
        """The measurements that are known, or a new cache where they are another GPU's or another version's; it must
        live until the plan is built."""
        cache = config.create_timing_cache(self.timing_cache)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
        other = "timing cache: it is another GPU's or another TensorRT's and is not read"
        warnings.warn(f"{other}; what is measured here replaces it", SpeederWarning, stacklevel=2)
        cache = config.create_timing_cache(b"")
        if cache is not None:
            config.set_timing_cache(cache, False)
        return cache

    def _parse(self, graph: Path) -> tuple[Any, Any]:
        network = self.builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = self.trt.OnnxParser(network, self.logger)
        if not parser.parse(_with_all_inputs(graph), str(graph)):
            reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise ExportError(f"{graph.stem}: TensorRT can't read it: {' '.join('; '.join(reasons[:3]).split())}")
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == self.trt.LayerType.ATTENTION_OUTPUT:
                # where no fused kernel fits the shape of heads, plain operators are better than no plan
                layer.__class__ = self.trt.IAttentionOutputLayer
                layer.attention.decomposable = True
        return network, parser

    def _profile(self, network: Any, shapes: Shapes, limits: Limits) -> Any:
        profile = self.builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if tensor.is_shape_tensor:
                profile.set_shape_input(tensor.name, *((value,) for value in limits[tensor.name]))
            elif any(isinstance(size, str) for size in shapes[tensor.name]):
                profile.set_shape(tensor.name, *profile_shapes(shapes[tensor.name], limits))
        return profile


def profile_shapes(shape: tuple[int | str, ...], limits: Limits) -> tuple[tuple[int, ...], ...]:
    """Least, typical and most of a shape."""
    return tuple(tuple(size if isinstance(size, int) else limits[size][which] for size in shape) for which in range(3))


def _with_all_inputs(graph: Path) -> bytes:
    """The graph without its inputs' defaults, which TensorRT would take for constants that nobody can set."""
    model = read_graph(graph)
    inputs = {entry.name for entry in model.graph.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    content: bytes = model.SerializeToString()
    return content


def make_logger(trt: Any) -> Any:
    """A logger that is silent and keeps the last error."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.last_error = " ".join(message.split())[:400]

    return Logger()


def make_monitor(trt: Any, note: Callable[[str], None]) -> Any:
    """What the builder reports its phases to, and asks whether to go on."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._unless_interrupted(note, phase_name)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._unless_interrupted(note, phase_name)
            return not self.interrupted

        def _unless_interrupted(self, call: Callable[[str], None], phase_name: str) -> None:
            # an exception must not pass through the builder: it is raised again when that has ended
            try:
                call(phase_name)
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()
