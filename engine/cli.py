"""The `speeder` command. Everything heavy is imported inside the commands, so that `--help` answers at once.

Exit code 0, or 1 with one line on stderr; SPEEDER_DEBUG=1 shows the traceback.
"""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speeder_engine.errors import ConfigError, InvalidRequest, SpeederError, SpeederWarning

if TYPE_CHECKING:
    from speeder_engine.request import OnUnknown

app = typer.Typer(
    help="Multimodal LLM recommendation at one token per item: train, evaluate, export, recommend.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
export_app = typer.Typer(help="Turn a checkpoint into what production loads.", no_args_is_help=True)
app.add_typer(export_app, name="export")

Data = Annotated[Path, typer.Argument(help="Data folder: interactions, items, images (see docs/data.md).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ParityUsers = Annotated[int, typer.Option(min=0, max=1_000_000, help="Random users to compare.")]
Column = Annotated[
    list[str] | None,
    typer.Option(
        help="ROLE=NAME for files with other names: user, item, time, title, text, image, vector; time_unit=ms."
    ),
]
Device = Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"speeder-engine {version('speeder-engine')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="A data folder; without it a small catalogue is made.")] = None,
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("demo"),
    recipe: Annotated[str | None, typer.Option(help="Packaged recipe or YAML file.")] = None,
    column: Column = None,
) -> None:
    """The whole path in minutes: data, training in stages, export, recommendations, latency, accuracy."""
    from speeder_engine.data.columns import Columns
    from speeder_engine.demo import run_demo
    from speeder_engine.training.heap import keep_freed_memory

    keep_freed_memory()
    run_demo(data, out, recipe, Columns.parse(column or []))


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write; one that is there is replaced.")],
    recipe: Annotated[
        str | None,
        typer.Option(help='Packaged recipe (small, title, study ...) or YAML file; "small", or what CHECKPOINT had.'),
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Go on with this model: new interactions, new items.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the epoch OUT stopped at, if it has one.")] = False,
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe, e.g. collaborative.epochs=3.")
    ] = None,
    fsdp: Annotated[bool, typer.Option(help="One of torchrun's processes: train together, in shards.")] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="A folder for TensorBoard's scalars.")] = None,
    min_interactions: Annotated[int, typer.Option(help="k of the k-core.")] = 5,
    column: Column = None,
    as_json: AsJson = False,
) -> None:
    """Train a model on a data folder, stage by stage; the log lies beside OUT."""
    from speeder_engine.checkpoint import Checkpoint, check_replaceable
    from speeder_engine.data.columns import Columns
    from speeder_engine.data.dataset import load_dataset
    from speeder_engine.data.splits import leave_one_out
    from speeder_engine.training.fit import train as fit
    from speeder_engine.training.heap import keep_freed_memory
    from speeder_engine.training.incremental import recipe_to_continue
    from speeder_engine.training.overrides import override
    from speeder_engine.training.parallel import ALONE, join_processes
    from speeder_engine.training.recipe import load_recipe

    keep_freed_memory()
    processes = join_processes() if fsdp else ALONE
    previous = None if start_from is None else Checkpoint.load(start_from)
    base = recipe_to_continue(previous) if previous and recipe is None else load_recipe(recipe or "small")
    config = override(base, [*(changes or []), *([] if seed is None else [f"seed={seed}"])])
    check_replaceable(out)  # before the data is read
    dataset = load_dataset(data, columns=Columns.parse(column or []), min_interactions=min_interactions)
    if not as_json:
        typer.echo(dataset.summary(), err=True)
    checkpoint = fit(
        leave_one_out(dataset),
        config,
        out,
        resume=resume,
        tensorboard=tensorboard,
        processes=processes,
        start_from=previous,
    )
    if not processes.is_first:
        return
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(out), **checkpoint.metrics}))
    else:
        typer.echo(f"checkpoint in {out}; next: speeder export engine {out} ENGINE")


@app.command()
def evaluate(
    systems: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints, engine directories or baselines: popularity, markov, itemknn; with times "
            "popularity_at_last, recent_popularity, recent_popularity_7, live_popularity, live_popularity_2; "
            "itemknn+live_popularity; "
            "trained first, minutes each: sasrec, gru4rec, hstu, sasrec_weeks and sasrec_time (with times), "
            "sasrec+itemknn, sasrec_weeks+itemknn, sasrec+live_popularity+itemknn, "
            "sasrec_time+live_popularity+itemknn."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Data folder.")],
    part: Annotated[str, typer.Option(help='"test" or "validation".')] = "test",
    candidates: Annotated[
        Path | None, typer.Option(help="Frozen candidate lists: read if there, else drawn and written.")
    ] = None,
    negatives: Annotated[
        int, typer.Option(min=0, help="Of each candidate list; 0: full ranking alone, without lists.")
    ] = 19,
    head: Annotated[
        str | None,
        typer.Option(
            help="How checkpoints and engines answer the candidate lists: retrieve, rank; engines also title, or "
            "generate (free text)."
        ),
    ] = None,
    by: Annotated[
        str, typer.Option(help="Also for groups of users: length, popularity (of the target), or both.")
    ] = "",
    against: Annotated[
        str | None, typer.Option(help="A system: how much the others differ from it, with paired 95 % intervals.")
    ] = None,
    min_interactions: Annotated[int, typer.Option(help="k of the k-core.")] = 5,
    column: Column = None,
    as_json: AsJson = False,
) -> None:
    """Full ranking and the candidate protocol (1 target among negatives), systems side by side."""
    from speeder_engine.data.columns import Columns
    from speeder_engine.evaluation.compare import compare, print_comparison

    columns, groupings = Columns.parse(column or []), [name.strip() for name in by.split(",") if name.strip()]
    comparison = compare(
        systems,
        data,
        part=part,
        candidates=candidates,
        min_interactions=min_interactions,
        columns=columns,
        head=head,
        by=groupings,
        against=against,
        num_negatives=negatives,
    )
    if as_json:
        typer.echo(json.dumps(comparison.to_json()))
    else:
        print_comparison(comparison)


@export_app.command("engine")
def export_engine(
    checkpoint: Annotated[Path, typer.Argument(help="A training checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The engine directory to write.")],
    as_json: AsJson = False,
) -> None:
    """Write an engine directory: adapters merged, weights fused, every item compressed to its token."""
    from speeder_engine.export.engine_directory import export_engine as export

    parts = export(checkpoint, out)
    if as_json:
        typer.echo(json.dumps({"engine": str(out), "revision": parts.revision, "num_items": len(parts.catalogue)}))
    else:
        typer.echo(f"engine {parts.revision} with {len(parts.catalogue):,} items in {out}")


@export_app.command("onnx")
def export_onnx(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    flavour: Annotated[
        str, typer.Option(help='"standard" (plain operators: TensorRT, any runtime) or "ort" (in-place sessions).')
    ] = "standard",
    dtype: Annotated[str, typer.Option(help='"float32", "float16" or "bfloat16".')] = "float32",
    graphs: Annotated[str, typer.Option(help="Which, separated by commas.")] = "score,recommend,extend,compress",
    opset: Annotated[int, typer.Option(help="Operator set; 0: the flavour's own.")] = 0,
    parity_users: ParityUsers = 1000,
    as_json: AsJson = False,
) -> None:
    """Write ONNX graphs with item ids in and ranked rows out, and prove that they answer as the engine does."""
    from speeder_engine.export.onnx_config import OnnxConfig
    from speeder_engine.export.to_onnx import export_onnx as export

    config = OnnxConfig(flavour, dtype, _names(graphs), opset)
    manifest = export(engine, out, config, parity_users)
    if as_json:
        typer.echo(json.dumps(manifest))
        return
    for name, graph in manifest["graphs"].items():
        typer.echo(f"{name:10}  {graph['export_cpu_seconds']:6.1f} s  {_compared(graph)}")
    typer.echo(f"{config.flavour} ONNX of engine {manifest['engine_revision']} in {out}")


def _compared(graph: dict[str, Any]) -> str:
    """What a manifest says of a graph's answers."""
    parity = graph["parity"]
    result = parity if isinstance(parity, str) else f"largest error {parity['max_error']:.1e}"
    return f"compared with the engine: {result}"


@export_app.command("tensorrt")
def export_tensorrt(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    runtime: Annotated[
        str, typer.Option(help='"rtx" (ahead of time, no GPU needed) or "tensorrt" (for the GPU that is there).')
    ] = "rtx",
    dtype: Annotated[str, typer.Option(help='"float16", "bfloat16", "float32" or "float8".')] = "float16",
    chips: Annotated[str, typer.Option(help="Compute capabilities without the dot; runtime rtx alone.")] = "",
    graphs: Annotated[str, typer.Option(help="Which, separated by commas.")] = "score,recommend,extend,compress",
    batch: Annotated[str, typer.Option(help="TYPICAL,MOST users at once.")] = "8,64",
    history: Annotated[str, typer.Option(help="TYPICAL,MOST rows; the most is the model's window.")] = "",
    candidates: Annotated[str, typer.Option(help="TYPICAL,MOST candidates of a request.")] = "20,100",
    excluded: Annotated[str, typer.Option(help="TYPICAL,MOST items a request excludes, seen too.")] = "64,1024",
    k: Annotated[str, typer.Option("-k", "--k", help="TYPICAL,MOST items of an answer.")] = "10,100",
    timing_cache: Annotated[Path | None, typer.Option(help="File of measurements; runtime tensorrt alone.")] = None,
    parity_users: ParityUsers = 1000,
    as_json: AsJson = False,
) -> None:
    """Build TensorRT plans of graphs that answer as the engine does. Plans have not been run: that takes a GPU."""
    from speeder_engine.export.plan_config import CHIPS_BY_DEFAULT, PlanConfig
    from speeder_engine.export.to_tensorrt import export_tensorrt as export

    ranges = {"batch": batch, "candidates": candidates, "excluded": excluded, "k": k, "history": history}
    config = PlanConfig(
        runtime=runtime,
        dtype=dtype,
        chips=_numbers("chips", chips) or (CHIPS_BY_DEFAULT[dtype == "float8"] if runtime == "rtx" else ()),
        graphs=_names(graphs),
        **{name: _numbers(name, text) for name, text in ranges.items()},
    )
    manifest = export(engine, out, config, timing_cache, parity_users)
    sizes = {name: entry["size"] for name, entry in manifest["files"].items() if name.endswith(".plan")}
    if as_json:
        parity = {name: graph["parity"] for name, graph in manifest["graphs"].items()}
        typer.echo(json.dumps({"export": str(out), "plans": sizes, "parity": parity}))
        return
    for name, size in sizes.items():
        typer.echo(f"{name:24} {size:>14,} bytes")
    for name, graph in manifest["graphs"].items():
        typer.echo(f"{name}: its graph {_compared(graph)}")
    typer.echo(f"{len(sizes)} plans in {out}, built and not run")


@export_app.command("triton")
def export_triton(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    out: Annotated[Path, typer.Argument(help="The model repository to write.")],
    backend: Annotated[str, typer.Option(help='"onnxruntime", or "tensorrt" on a GPU host.')] = "onnxruntime",
    dtype: Annotated[str, typer.Option(help='"float32" or "float16"; plans also "bfloat16".')] = "float32",
    graphs: Annotated[str, typer.Option(help="Which, separated by commas.")] = "recommend,score,session",
    batch: Annotated[str, typer.Option(help="TYPICAL,MOST requests of a batch.")] = "8,64",
    candidates: Annotated[str, typer.Option(help="TYPICAL,MOST candidates of a request.")] = "20,128",
    excluded: Annotated[str, typer.Option(help="TYPICAL,MOST items a request excludes, seen too.")] = "64,1024",
    k: Annotated[int, typer.Option("-k", "--k", help="How many items are answered.")] = 100,
    queue_size: Annotated[int, typer.Option(help="Requests that may wait; one more is rejected.")] = 256,
    queue_ms: Annotated[int, typer.Option(help="How long one may wait before it is rejected.")] = 200,
    batch_wait_us: Annotated[int, typer.Option(help="How long a request waits for company.")] = 500,
    max_sessions: Annotated[int, typer.Option(help="Users with a state on each instance.")] = 1024,
    session_idle_s: Annotated[int, typer.Option(help="When an idle user's state is forgotten.")] = 600,
    parity_users: ParityUsers = 1000,
    as_json: AsJson = False,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server: item ids in, ranked item ids out."""
    from speeder_engine.export.triton_config import TritonConfig
    from speeder_engine.export.triton_server import export_triton as export

    config = TritonConfig(
        backend=backend,
        dtype=dtype,
        graphs=_names(graphs),
        batch=_numbers("batch", batch),
        candidates=_numbers("candidates", candidates),
        excluded=_numbers("excluded", excluded),
        k=k,
        queue_size=queue_size,
        queue_ms=queue_ms,
        batch_wait_us=batch_wait_us,
        max_sessions=max_sessions,
        session_idle_s=session_idle_s,
    )
    manifest = export(engine, out, config, parity_users)
    models = manifest["models"]
    if as_json:
        parity = {name: graph["parity"] for name, graph in manifest["graphs"].items()}
        typer.echo(json.dumps({"repository": str(out), "models": models, "parity": parity}))
        return
    for name, graph in manifest["graphs"].items():
        typer.echo(f"{name:10}  {_compared(graph)}")
    typer.echo(f"{len(models)} models in {out}; clients call {', '.join(m for m in models if m.endswith('_items'))}")


@app.command()
def recommend(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    history: Annotated[
        list[str] | None, typer.Option("--history", help="Item ids, oldest first; repeat, or separate by commas.")
    ] = None,
    candidates: Annotated[list[str] | None, typer.Option(help="Rank these instead of the whole catalogue.")] = None,
    head: Annotated[
        str | None, typer.Option(help="retrieve; with candidates also rank (the default then) or title.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    source: Annotated[
        Path | None, typer.Option("--input", help="Parquet file: `history`, and if there are `user_id`, `times`.")
    ] = None,
    target: Annotated[Path | None, typer.Option("--output", help="Parquet file to write.")] = None,
    skip_unknown: Annotated[bool, typer.Option(help="Skip unknown ids instead of refusing.")] = False,
    times: Annotated[
        list[str] | None,
        typer.Option("--times", help="Unix seconds of the history, for models that read them."),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help='"auto", "float32", "bfloat16" or "float16".')] = "auto",
    weights: Annotated[str, typer.Option(help='"auto", "int8" or "fp8": a byte each.')] = "auto",
    as_json: AsJson = False,
) -> None:
    """Recommend for one history, or for a Parquet file of histories in batches."""
    from speeder_engine.config import MOST_INT32
    from speeder_engine.engine import Engine

    if (source is None) != (target is None):
        raise ConfigError("recommend: --input and --output go together")
    if source is not None and (history or candidates or head or times):
        raise ConfigError("recommend: --input takes neither --history nor --times nor --candidates nor --head")
    ranked = _ids(candidates)
    if candidates and not ranked:
        raise InvalidRequest("recommend: --candidates names no item; leave it out to search the whole catalogue")
    # one-off answers need no session cache, and nobody waits behind a long list
    loaded = Engine.load(engine, device=device, dtype=dtype, kv_budget="0", weights=weights, max_candidates=MOST_INT32)
    on_unknown: OnUnknown = "skip" if skip_unknown else "error"
    if source is not None and target is not None:
        from speeder_engine.bulk import recommend_file

        count = recommend_file(loaded, source, target, k, on_unknown)
        typer.echo(json.dumps({"users": count, "output": str(target)}) if as_json else f"{count:,} users in {target}")
        return
    if history and not times and loaded.parts.config.prompt.calendar is not None:
        message = "--times is not given, which this model reads; all times count as not known"
        warnings.warn(message, SpeederWarning, stacklevel=1)
    ranking = loaded.recommend(
        _ids(history),
        k,
        candidates=ranked or None,
        head=head,  # type: ignore[arg-type]
        times=_seconds(times) if times else None,
        on_unknown=on_unknown,
    )
    if as_json:
        typer.echo(json.dumps({"items": ranking.items, "scores": ranking.scores, "unknown": ranking.unknown}))
        return
    for place, (item_id, score) in enumerate(ranking, 1):
        typer.echo(f"{place:3d}  {item_id}  {score:8.4f}  {loaded.catalogue.title(item_id)}")


@app.command()
def inspect(engine: Annotated[Path, typer.Argument(help="An engine directory.")], as_json: AsJson = False) -> None:
    """What an engine directory holds, and how much memory it will take."""
    from speeder_engine.inspection import inspect_engine

    summary = inspect_engine(engine)
    if as_json:
        typer.echo(json.dumps(summary.to_json()))
    else:
        from rich.console import Console

        from speeder_engine.tables import summary_table

        Console().print(summary_table(summary))


def _names(text: str) -> tuple[str, ...]:
    """`score,extend` -> its parts."""
    return tuple(name.strip() for name in text.split(","))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """`8,64` -> its numbers; nothing -> none."""
    try:
        return tuple(int(number) for number in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"{name}: expected whole numbers between commas, got {text!r}") from None


def _seconds(values: list[str]) -> list[float]:
    """`--times 1700000000,1700000500` -> its numbers."""
    try:
        return [float(second) for value in values for second in value.split(",")]
    except ValueError:
        raise ConfigError(f"--times: expected Unix seconds between commas, got {','.join(values)!r}") from None


def _ids(values: list[str] | None) -> list[str]:
    """`--history a,b --history c` -> a, b, c."""
    ids = [item_id.strip() for value in values or [] for item_id in value.split(",")]
    if "" in ids and ids != [""]:
        raise InvalidRequest("item ids: an empty one between commas; write for example --history 0012,0345")
    return [item_id for item_id in ids if item_id]


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, SpeederWarning):
        typer.echo(f"warning: {message}", err=True)


def main() -> None:
    """The entry point: every expected failure is one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("speeder_engine").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # we show our own
    # threads that spin while they wait make everything ten times slower as soon as another process wants a core
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.showwarning = _show_warning
    try:
        with _ended_cleanly():
            code = app(standalone_mode=False)  # an interrupted command returns its code here, others None
    except (KeyboardInterrupt, typer.Abort):
        code = 1
    except Exception as error:
        if os.environ.get("SPEEDER_DEBUG") == "1":
            raise
        typer.echo(f"error: {' '.join(_describe(error).split())}", err=True)
        sys.exit(1)
    if code:
        typer.echo("interrupted", err=True)
        sys.exit(1)


@contextmanager
def _ended_cleanly() -> Iterator[None]:
    """What supervisors send is taken as Ctrl-C: a process that is simply ended leaves half-written folders."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _describe(error: Exception) -> str:
    """One line: our own errors and wrong usage say what to do, anything else is a bug and says where to look."""
    if isinstance(error, SpeederError):
        return str(error).replace("on_unknown='skip'", "--skip-unknown")  # as this command spells it
    usage = getattr(error, "format_message", None)  # what the command parser raises
    if usage is not None:
        return f"{usage()} Try --help."
    return f"{type(error).__name__}: {error}; SPEEDER_DEBUG=1 shows where"


if __name__ == "__main__":  # as torchrun starts it
    main()
