"""A TensorRT that computes on the CPU: its plans are ONNX files with their profile, run by ONNX Runtime.

It reads and writes the addresses it is given and knows nothing else, so that what is bound is what is tested.
"""

import ctypes
import json
from dataclasses import replace
from enum import Enum
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import torch

from speeder_engine.config import DecoderConfig, FollowersConfig
from speeder_engine.data.splits import Histories
from speeder_engine.export.plan_builder import profile_shapes
from speeder_engine.export.plan_session import PlanRuntime
from speeder_engine.random_engine import random_parts
from speeder_engine.training.follower_counts import follower_table

Mode = Enum("Mode", "INPUT OUTPUT")
Location = Enum("Location", "HOST DEVICE")
TYPES = {"float": "FLOAT", "int64": "INT64", "bool": "BOOL", "float16": "HALF"}
NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "BOOL": np.bool_, "HALF": np.float16}
CHIP = 89


class FakeBuilder:
    """In the place of PlanBuilder."""

    def __init__(self, trt, timing_cache, note):
        self.timing_cache = timing_cache
        self.note = note

    def build(self, graph, shapes, limits, chip):
        self.note("Building engine")
        model = onnx.load(graph)
        inputs = {entry.name for entry in model.graph.input}
        kept = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        profile = {name: [list(one) for one in profile_shapes(shape, limits)] for name, shape in shapes.items()}
        if "k" in profile:
            profile["k"] = [[value] for value in limits["k"]]
        model.metadata_props.add(key="profile", value=json.dumps(profile))
        return model.SerializeToString()


class FakeEngine:
    def __init__(self, content):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.profile = json.loads(self.session.get_modelmeta().custom_metadata_map["profile"])
        self.inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self.tensors = self.inputs | {entry.name: entry for entry in self.session.get_outputs()}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=TYPES[self.tensors[name].type.removeprefix("tensor(").removesuffix(")")])

    def get_tensor_location(self, name):
        return Location.HOST if name == "k" else Location.DEVICE

    def get_tensor_shape(self, name):
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name, index):
        return tuple(tuple(one) for one in self.profile[name])

    def get_tensor_profile_values(self, index, name):
        return self.profile[name]

    def create_execution_context(self):
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine):
        self.engine = engine
        self.shapes, self.addresses, self.answers = {}, {}, {}
        self.runs = 0

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.profile[name] if name != "k" else ([1],) * 3
        self.shapes[name] = shape
        return len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name, address):
        assert address != 0
        self.addresses[name] = address

    def infer_shapes(self):
        missing = [name for name in self.engine.inputs if name not in self.shapes or name not in self.addresses]
        if not missing:
            # the shapes of answers are those of the answers
            feeds = {name: self._array(name, self.shapes[name]) for name in self.engine.inputs}
            names = [name for name in self.engine.tensors if name not in self.engine.inputs]
            self.answers = dict(zip(names, self.engine.session.run(names, feeds), strict=True))
        return missing

    def get_tensor_shape(self, name):
        return self.answers[name].shape

    def execute_async_v3(self, stream):
        assert stream == 0
        for name, answer in self.answers.items():
            self._array(name, answer.shape)[...] = answer
        self.runs += 1
        self.shapes, self.addresses = {}, {}
        return True

    def _array(self, name, shape):
        dtype = np.dtype(NUMPY[self.engine.get_tensor_dtype(name).name])
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


def fake_runtime():
    trt = SimpleNamespace(TensorIOMode=Mode, TensorLocation=Location)
    logger = SimpleNamespace(last_error="as it was told to")
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    runtime = SimpleNamespace(deserialize_cuda_engine=FakeEngine)
    return PlanRuntime(trt, logger, runtime, torch.device("cpu"), stream)


def small_parts(num_layers=2, followers=True):
    """An engine that is quickly traced and built: a window of 12, 120 items called "0000000", ..., and (or not) who
    follows whom among them."""
    decoder = DecoderConfig(64, 32, num_layers, 4, 2, 16, 64)
    parts = random_parts(decoder, num_items=120, instruction_len=5, window=12, window_step=4)
    parts.model.rank.role.data.mul_(10)
    if not followers:
        return parts
    histories = np.random.default_rng(0).integers(0, 120, 600).astype(np.int32)
    table = follower_table(FollowersConfig(window=3, last=4, keep=5), Histories(np.arange(0, 601, 10), histories), 120)
    config = replace(parts.config, followers=table.config)
    parts.model.config, parts.model.followers = config, table.requires_grad_(False)
    return replace(parts, config=config)
