"""Does an export answer as the engine does? Random users, on shapes that were not traced, graph by graph."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speeder_engine.config import CompressorConfig, EngineConfig
from speeder_engine.engine import Engine
from speeder_engine.errors import ConfigError, ExportError, MissingDependency
from speeder_engine.export.graph_engine import GraphEngine
from speeder_engine.export.onnx_config import OnnxConfig
from speeder_engine.export.onnx_engine import OnnxEngine, OnnxFiles
from speeder_engine.export.onnx_session import load_runtime
from speeder_engine.models.compressor import make_compressor
from speeder_engine.parts import EngineParts
from speeder_engine.progress import track
from speeder_engine.request import Ranking, Request

# of a score, where a ranking's largest is 1 at most; half precision is relative, so beyond that in proportion
BOUNDS = {"float32": 1e-4, "float16": 5e-3}
PARITY_USERS = 1000
TOP = 10
MOST_K = 3 * TOP - 1
MOST_AT_ONCE = 32
MOST_CANDIDATES = 40


@dataclass(frozen=True)
class Parity:
    """`max_error`: the worst score, over max(1, the size of its ranking's largest); `max_absolute_error`: as it is.
    `same_top`: the share of users with the same ten items in order; the others differ by swaps inside the bound."""

    users: int
    bound: float
    max_error: float
    max_absolute_error: float
    same_top: float

    def check(self, graph: str) -> None:
        """Raises ExportError where the bound does not hold."""
        if self.max_error > self.bound:
            found = f"scores are off by {self.max_error:.2g}, at most {self.bound:.0e} is allowed"
            raise ExportError(f"graph {graph}: {found}; keep float32, or report it with the engine's revision")


def why_not_compared(dtype: str, num_users: int) -> str | None:
    """Why graphs of this type are not compared with the engine here; None where they are."""
    if num_users == 0:
        return "no users were asked for"
    if dtype not in BOUNDS:
        return f"ONNX Runtime runs no {dtype} on a CPU"
    try:
        load_runtime("cpu")
    except (MissingDependency, ConfigError) as error:
        return str(error)
    return None


def describe(parity: Parity | None, why_not: str | None) -> dict[str, Any] | str:
    """As a manifest has it."""
    return f"not run: {why_not}" if parity is None else asdict(parity)


def compare_files(parts: EngineParts, config: OnnxConfig, folder: Path, num_users: int) -> dict[str, Parity]:
    """The graphs in a folder of ONNX files with the engine, by their names. Raises ExportError where one is off."""
    files = OnnxFiles(folder, config, parts.config, parts.catalogue.table(), parts.revision)
    return compare(parts, OnnxEngine(files, "cpu"), num_users)


def compare(
    parts: EngineParts, exported: GraphEngine, num_users: int, names: Mapping[str, str] | None = None, k: int = MOST_K
) -> dict[str, Parity]:
    """Closes `exported`. names: what graphs are called in results and errors, where that is something else; k: the most
    items that a request asks for. Raises ExportError where one is off."""
    reference = Engine(parts, EngineConfig(device="cpu", dtype="float32", kv_budget="0"))
    with reference, exported:
        found = run_parity(reference, exported, num_users, k=k)
    parity = {(names or {}).get(graph, graph): result for graph, result in found.items()}
    for name, result in parity.items():
        result.check(name)
    return parity


def run_parity(
    reference: Engine, exported: GraphEngine, num_users: int, seed: int = 0, k: int = MOST_K
) -> dict[str, Parity]:
    """By graph. `reference` answers in float32 without sessions; k: the most items that a request asks for."""
    rng = np.random.default_rng(seed)
    bound = BOUNDS[exported.files.config.dtype]
    results: dict[str, Parity] = {}
    for graph in exported.files.config.graphs:
        if graph == "compress":
            results[graph] = _compress_parity(reference, exported, num_users, rng)
            continue
        requests = _requests(reference, graph, num_users, rng, k)
        parts = track(list(_batches(requests, rng)), f"checking {graph}")
        pairs = [pair for part in parts for pair in _answers(reference, exported, graph, part)]
        results[graph] = measure(pairs, bound)
    return results


def measure(pairs: Sequence[tuple[Ranking, Ranking]], bound: float) -> Parity:
    """Pairs of what was expected and what was found."""
    errors = [ranking_error(expected, found) for expected, found in pairs]
    scaled = [error / _scale(expected) for error, (expected, _) in zip(errors, pairs, strict=True)]
    same = [expected.items[:TOP] == found.items[:TOP] for expected, found in pairs]
    worst, absolute = (float(np.max(each, initial=0.0)) for each in (scaled, errors))
    return Parity(len(pairs), bound, worst, absolute, float(np.mean(same)) if same else 1.0)


def _scale(ranking: Ranking) -> float:
    return max([1.0, *map(abs, ranking.scores)])


def ranking_error(expected: Ranking, found: Ranking) -> float:
    """The worst of: an item's score against its own, and a place's score against that place's, so that items may only
    change places where their scores are that near. Infinite where the numbers of items differ or one is
    no number."""
    if len(expected) != len(found) or not np.isfinite(found.scores).all():
        return float("inf")
    scores, worst = dict(expected), 0.0
    for (item_id, score), place in zip(found, expected.scores, strict=True):
        # an item beyond the expected ones scores at most as the last of them
        own = scores.get(item_id, min(score, expected.scores[-1]))
        worst = max(worst, abs(score - own), abs(score - place))
    return worst


def _requests(engine: Engine, graph: str, num_users: int, rng: np.random.Generator, most_k: int) -> list[Request]:
    ids = engine.catalogue.item_ids
    config = engine.parts.config.prompt
    requests = []
    for user in range(num_users):
        length = int(rng.integers(0, config.window + config.window // 2 + 1))
        history = [ids[i] for i in rng.integers(0, len(ids), length)]
        named = graph == "score" or (graph == "extend" and user % 2 == 1)
        count = int(rng.integers(1, min(MOST_CANDIDATES, len(ids)) + 1))
        candidates = [ids[i] for i in rng.choice(len(ids), count, replace=False)] if named else None
        times = rng.uniform(0, 2e9, length).tolist() if config.calendar is not None else None
        k = min(int(rng.integers(TOP, MOST_K + 1)), most_k)
        requests.append(Request(history, k, candidates=candidates, times=times))
    return requests


def _batches(requests: Sequence[Request], rng: np.random.Generator) -> Iterator[Sequence[Request]]:
    at = 0
    while at < len(requests):
        size = int(rng.integers(1, MOST_AT_ONCE + 1))
        yield requests[at : at + size]
        at += size


def _answers(
    reference: Engine, exported: GraphEngine, graph: str, requests: Sequence[Request]
) -> list[tuple[Ranking, Ranking]]:
    if graph == "extend":
        return [(reference.recommend_many([each])[0], _returning(exported, each)) for each in requests]
    return list(zip(reference.recommend_many(requests), exported.recommend_many(requests), strict=True))


def _returning(exported: GraphEngine, request: Request) -> Ranking:
    """The answer to a user who has been here with the first two thirds of the history."""
    some = len(request.history) * 2 // 3
    times = None if request.times is None else request.times[:some]
    before = replace(request, history=request.history[:some], times=times, user_id="returning")
    exported.recommend_many([before])
    [answer] = exported.recommend_many([replace(request, user_id="returning")])
    return answer


def _compress_parity(reference: Engine, exported: GraphEngine, count: int, rng: np.random.Generator) -> Parity:
    """Item tokens of random features, some modalities missing, against the compressor in double precision; errors are
    of elements whose size is one."""
    config = reference.parts.config.compressor
    features: dict[str, NDArray[np.float32]] = {}
    for name, width in config.modalities.items():
        values = rng.standard_normal((count, width)).astype(np.float32)
        values[rng.random(count) < 0.3] = np.nan
        features[name] = values
    expected = _compressed(config, reference.parts.compressor, features)
    error = float(np.abs(exported.compress(features) - expected).max(initial=0.0))
    # item tokens are float32 in every export
    return Parity(count, BOUNDS["float32"], error / config.scale, error, 1.0)


def _compressed(
    config: CompressorConfig, weights: dict[str, torch.Tensor], features: dict[str, NDArray[np.float32]]
) -> NDArray[np.float64]:
    compressor = make_compressor(config).double()
    compressor.load_state_dict(weights)
    present = np.stack([np.isfinite(values).all(axis=1) for values in features.values()], axis=1)
    with torch.inference_mode():
        given = {name: torch.from_numpy(np.nan_to_num(values)).double() for name, values in features.items()}
        tokens: NDArray[np.float64] = compressor(given, torch.from_numpy(present)).numpy()
    return tokens
