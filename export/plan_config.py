"""What a TensorRT export is asked to be, and what kind of directory it makes.

export.json            manifest: settings, engine revision, tools, inputs, outputs, profiles, hashes of all files
sm80/<graph>.plan      score, recommend, extend, compress, for one chip; weights included
items.parquet          item id <-> row, titles, availability, prior
"""

from dataclasses import dataclass, field

from speeder_engine.artifact import Kind
from speeder_engine.config import MOST_INT32, Config, ModelConfig, check
from speeder_engine.export.onnx_config import GRAPHS, OnnxConfig, check_chosen

PLANS = Kind("speeder-tensorrt", 1, "export.json", "TensorRT export", "`speeder export tensorrt ENGINE OUT`")
RUNTIMES = ("rtx", "tensorrt")
DTYPES = ("float16", "bfloat16", "float32", "float8")
# what tensorrt-rtx builds for without having it; tensorrt builds for the GPU it finds
CHIPS = (75, 80, 86, 89, 120, 121)
FLOAT8_FROM = 89  # the first chip that multiplies it
CHIPS_BY_DEFAULT = {False: (80, 86, 89, 120), True: (89, 120)}  # by whether the type is float8
MOST_K = 3840  # of TensorRT's TopK
Range = tuple[int, ...]  # typical, most; the least is 1


@dataclass(frozen=True)
class PlanConfig(Config):
    """chips: compute capabilities without the dot; empty for "tensorrt", which builds for the GPU that is there.

    batch, history, candidates, excluded, k: (typical, most) of the optimisation profile. history: empty takes the
    model's window.
    """

    runtime: str = "rtx"
    dtype: str = "float16"
    chips: tuple[int, ...] = (80, 86, 89, 120)
    graphs: tuple[str, ...] = field(default=GRAPHS)
    batch: Range = (8, 64)
    history: Range = ()
    candidates: Range = (20, 100)
    excluded: Range = (64, 1024)
    k: Range = (10, 100)

    def check_values(self) -> None:
        check(self.runtime in RUNTIMES, f"runtime: {self.runtime!r} is not one of {', '.join(RUNTIMES)}")
        check(self.dtype in DTYPES, f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        check_chosen("graphs", self.graphs, GRAPHS)
        self._check_chips()
        for name in ("batch", "history", "candidates", "excluded", "k"):
            chosen = getattr(self, name)
            if name == "history" and not chosen:
                continue
            right = len(chosen) == 2 and 1 <= chosen[0] <= chosen[1] <= MOST_INT32
            wanted = f"TYPICAL,MOST with 1 <= TYPICAL <= MOST <= {MOST_INT32}"
            check(right, f"{name}: expected {wanted}, got {','.join(map(str, chosen))}")
        check(self.k[1] <= MOST_K, f"k: TensorRT finds at most {MOST_K} of the best, got {self.k[1]}")

    def _check_chips(self) -> None:
        if self.runtime == "tensorrt":
            check(not self.chips, "chips: tensorrt builds for the GPU that is there; leave them out or use runtime rtx")
            return
        check_chosen("chips", self.chips, CHIPS, "can't be built for ahead")
        small = [chip for chip in self.chips if chip < FLOAT8_FROM] if self.dtype == "float8" else []
        check(not small, f"chips: {small} multiply no float8; it begins with {FLOAT8_FROM}")

    @property
    def graph_config(self) -> OnnxConfig:
        """Of the graphs that the plans are built from."""
        dtype = "float16" if self.dtype == "float8" else self.dtype
        return OnnxConfig(flavour="standard", dtype=dtype, graphs=self.graphs)

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError for a profile that the model's prompts can't fill."""
        window = model.prompt.window
        if self.history:
            longest = f"history: the profile takes {self.history[1]} rows, the model's window is {window}"
            check(self.history[1] == window, f"{longest}; leave the option out or end with {window}")

    def limits(self, model: ModelConfig) -> dict[str, Range]:
        """Least, typical and most of every dimension that varies, by its name in the graphs."""
        typical, window = self.history or (model.prompt.window,) * 2
        return {
            "batch": (1, *self.batch),
            "history": (1, typical, window),
            "candidates": (1, *self.candidates),
            "excluded": (1, *self.excluded),
            # a returning user's one new row, or all of a new one
            "rows": (1, 1, window),
            "past": (1, typical, window),
            "items": (1, *self.batch),
            "k": (1, *self.k),
        }
