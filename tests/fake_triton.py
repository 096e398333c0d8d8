"""A Triton server in a hundred lines: reads the repository with Triton's own schema and runs it as Triton would.

Requests of a batch are stacked only where their shapes are equal; implicit state is kept by correlation id and begins
as `initial_state` says; ensembles run step by step, Python models with a stand-in for `triton_python_backend_utils`.
"""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2 as schema

DTYPES = {
    schema.TYPE_INT64: np.int64,
    schema.TYPE_FP32: np.float32,
    schema.TYPE_FP16: np.float16,
    schema.TYPE_FP64: np.float64,
    schema.TYPE_STRING: np.object_,
}


def read_config(path):
    return text_format.Parse(path.read_text(encoding="utf-8"), schema.ModelConfig())


class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


def python_backend_utils():
    module = ModuleType("triton_python_backend_utils")
    module.Tensor = Tensor
    module.TritonError = lambda message: SimpleNamespace(message=message)
    module.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(tensors=output_tensors, error=error)
    module.get_input_tensor_by_name = lambda request, name: request.get(name)
    return module


class Refused(Exception):
    """What a client sees as an error."""


class FakeTriton:
    def __init__(self, repository):
        self.repository = repository
        self.configs = {path.parent.name: read_config(path) for path in repository.glob("*/config.pbtxt")}
        self.models, self.states = {}, {}
        for name, config in self.configs.items():
            assert config.name == name
            assert (repository / name / "1").is_dir()
            if config.backend == "onnxruntime":
                path = repository / name / "1" / config.default_model_filename
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 3
                self.models[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            elif config.backend == "python":
                self.models[name] = self._python(name)

    def infer(self, name, sequence=None, start=False, **inputs):
        """One request with a batch dimension; `sequence`: its correlation id."""
        [answer] = self.infer_many(name, [{"sequence": sequence, "start": start, **inputs}])
        return answer

    def infer_many(self, name, requests):
        """Requests that arrive together."""
        controls = [{key: request.pop(key, None) for key in ("sequence", "start")} for request in requests]
        config = self.configs[name]
        for request in requests:
            check_tensors(config.input, request, config.max_batch_size)
        if config.platform == "ensemble":
            answers = self._ensemble(config, requests, controls)
        elif config.backend == "python":
            answers = self._run_python(name, requests)
        else:
            answers = self._run_graph(config, requests, controls)
        for answer in answers:
            check_tensors(config.output, answer, config.max_batch_size)
        return answers

    def _ensemble(self, config, requests, controls):
        known = [dict(request) for request in requests]
        for step in config.ensemble_scheduling.step:
            fed = [
                {key: tensors[value] for key, value in step.input_map.items()} | control
                for tensors, control in zip(known, controls, strict=True)
            ]
            for tensors, answer in zip(known, self.infer_many(step.model_name, fed), strict=True):
                tensors.update({value: answer[key] for key, value in step.output_map.items()})
        return [{output.name: tensors[output.name] for output in config.output} for tensors in known]

    def _run_python(self, name, requests):
        given = [{key: Tensor(key, array) for key, array in request.items()} for request in requests]
        responses = self.models[name].execute(given)
        for response in responses:
            if response.error is not None:
                raise Refused(response.error.message)
        return [{tensor.name: tensor.array for tensor in response.tensors} for response in responses]

    def _run_graph(self, config, requests, controls):
        groups = {}
        for place, request in enumerate(requests):
            shape = tuple((key, array.shape[1:]) for key, array in sorted(request.items()))
            groups.setdefault(shape, []).append(place)
        answers = {}
        for places in groups.values():
            fed = [requests[place] | self._state(config, controls[place]) for place in places]
            sizes = [len(next(iter(request.values()))) for request in fed]
            stacked = {key: np.concatenate([request[key] for request in fed]) for key in fed[0]}
            names = [output.name for output in self.models[config.name].get_outputs()]
            found = dict(zip(names, self.models[config.name].run(names, stacked), strict=True))
            ends = np.cumsum(sizes)
            for place, size, end in zip(places, sizes, ends, strict=True):
                own = {key: array[end - size : end] for key, array in found.items()}
                self._keep(config, controls[place], own)
                answers[place] = {output.name: own[output.name] for output in config.output}
        return [answers[place] for place in range(len(requests))]

    def _state(self, config, control):
        if not config.sequence_batching.state:
            return {}
        if control["start"]:
            first = {}
            for state in config.sequence_batching.state:
                [initial] = state.initial_state
                assert initial.zero_data and initial.data_type == state.data_type and initial.dims == state.dims
                first[state.input_name] = np.zeros((1, *initial.dims), DTYPES[initial.data_type])
            return first
        if (config.name, control["sequence"]) not in self.states:
            raise Refused("must specify the START flag on the first request of the sequence")
        return self.states[config.name, control["sequence"]]

    def _keep(self, config, control, answer):
        if config.sequence_batching.state:
            kept = {state.input_name: answer[state.output_name] for state in config.sequence_batching.state}
            self.states[config.name, control["sequence"]] = kept

    def _python(self, name):
        config = json_format.MessageToDict(self.configs[name], preserving_proto_field_name=True)
        return load_step(self.repository / name, config)


def load_step(folder, config):
    """A Python model out of its folder in a repository."""
    spec = importlib.util.spec_from_file_location(f"model_of_{folder.name}", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_python_backend_utils"] = python_backend_utils()
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["triton_python_backend_utils"]
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"})
    return model


def check_tensors(declared, tensors, max_batch):
    """What Triton checks of a request: names, types, and dimensions behind the batch."""
    assert {each.name for each in declared} == set(tensors), sorted(tensors)
    for each in declared:
        array = tensors[each.name]
        assert array.dtype == DTYPES[each.data_type], each.name
        assert 1 <= array.shape[0] <= max_batch
        dims = list(array.shape[1:])
        assert len(dims) == len(each.dims)
        assert all(wanted in (-1, size) for wanted, size in zip(each.dims, dims, strict=True)), (each.name, dims)


def ids(*rows):
    """Lists of item ids as a batch of strings, padded with the empty one."""
    width = max(1, *map(len, rows))
    padded = [[*(each.encode() for each in row), *[b""] * (width - len(row))] for row in rows]
    return np.array(padded, dtype=object)


def named(array, scores):
    """The first user's item ids and scores, padding left out."""
    pairs = [(each.decode(), float(score)) for each, score in zip(array[0], scores[0], strict=True) if each]
    return [item_id for item_id, _ in pairs], [score for _, score in pairs]
