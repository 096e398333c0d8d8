"""docs/performance.md, and what README.md repeats of it, say what the committed results say."""

import json
import re

import pytest

RESULTS = {
    "all": "zen4-2-cores/all-0.5b.json",
    "runtimes": "zen4-2-cores/latency-0.5b-runtimes.json",
    "tricks": "zen4-2-cores/tricks-0.5b.txt",
    "avx2": "zen3-2-cores/latency-0.5b.json",
    "avx2 onnx": "zen3-2-cores/latency-0.5b-onnxruntime.json",
    "avx2 catalogue": "zen3-2-cores/catalogue-0.5b.json",
    "avx2 host": "zen3-2-cores/host.json",
}
NUMBER = r"(\d[\d,]*(?:\.\d+)?|\.\d+)"
RUNS_OF_INT8 = 12  # its file has no key for them, the table beside it has
TRICKS = {
    "a returning user's keys are kept": "sessions",
    "the instruction is computed once": "shared_instruction",
    "20 candidates in one pass": "one_pass",
    "native passes": "native_kernels",
    "int8 weights (off": "int8_weights",
    "weights in huge pages": "huge_pages",
    "two threads": "all_threads",
    "the last layer": "last_layer",
    "16 returning users": "batching",
}


@pytest.fixture(scope="module")
def found(root):
    """Name -> keys: of JSON, or of a text's last line."""
    texts = {name: (root / "bench" / "results" / path).read_text() for name, path in RESULTS.items()}
    return {
        name: json.loads(text.splitlines()[-1] if RESULTS[name].endswith(".txt") else text)
        for name, text in texts.items()
    }


@pytest.fixture(scope="module")
def document(root):
    return (root / "docs" / "performance.md").read_text()


def numbers(cells):
    """Those of a row; what stands in parentheses are notes."""
    return re.findall(NUMBER, re.sub(r"\([^)]*\)", "", " | ".join(cells)))


def rows_of(document, heading):
    """Label -> figures, of the tables under a heading."""
    (part,) = [each for each in re.split(r"^#+ ", document, flags=re.M) if each.startswith(f"{heading}\n")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return {label.replace("*", ""): numbers(cells) for label, *cells in lines}


def row(rows, label):
    """Of the label that is this, or the only one that begins so."""
    (found,) = [each for each in rows if each == label] or [each for each in rows if each.startswith(label)]
    return rows[found]


def check(shown, expected):
    """Each figure is the measured one, rounded to the digits that are shown."""
    assert len(shown) == len(expected), (shown, expected)
    for text, value in zip(shown, expected, strict=True):
        digits = len(text.partition(".")[2])
        assert abs(float(text.replace(",", "")) - value) <= 0.5 * 10**-digits + 1e-9, (text, value)


def says(text, sentence, values):
    """The sentence, with a figure for every {}."""
    pattern = re.escape(sentence).replace(r"\{\}", NUMBER)
    plain = " ".join(text.split())
    (match,) = re.finditer(pattern.replace(r"\ ", " "), plain)
    check(match.groups(), values)


def contender(keys, name, runs=True, cold=True, warm=True):
    """Of a row: cold ms, runs and ratio, and the same for returning users."""
    figures = []
    for what, suffix, there in (("cold", "", cold), ("warm", "_warm", warm)):
        if there:
            counted = [keys[f"{name}_{what}_runs"]] if runs else []
            figures += [keys[f"{name}_{what}_ms"], *counted, keys[f"vs_{name}{suffix}"]]
    return figures


def test_one_user(document, found):
    rows, keys, runtimes = rows_of(document, "One user"), found["all"], found["runtimes"]
    check(row(rows, "speeder-engine, bf16"), [keys["cold_ms"], 40, 1, keys["warm_ms"], 40, 1])
    assert keys["cold_runs"] == keys["warm_runs"] == 40
    small = [1 / keys["int8_over_bf16"], keys["int8_warm_ms"], RUNS_OF_INT8, 1 / keys["int8_over_bf16_warm"]]
    check(row(rows, "speeder-engine, int8"), [keys["int8_cold_ms"], RUNS_OF_INT8, *small])
    for label, name, has_warm in (
        ("transformers, one token an item, no cache", "transformers_uncached", False),
        ("transformers, static cache + 4-D mask, eager", "transformers_static", True),
        ("transformers, one prompt a candidate", "separate_prompts", False),
        ("transformers, titles + greedy", "text_generation", True),
        ("transformers, titles + image", "multimodal_generation", True),
    ):
        check(row(rows, label), contender(keys, name, warm=has_warm))
    for label, name in (
        ("transformers, static cache + 4-D mask, torch.compile", "transformers_compiled"),
        ("ONNX Runtime", "onnxruntime"),
        ("OpenVINO", "openvino"),
    ):
        check(row(rows, label), contender(runtimes, name))


def test_percentiles_are_of_runs_that_have_a_word_on_them(document, found):
    keys = found["all"]
    assert min(keys["cold_runs"], keys["warm_runs"]) >= 20
    says(document, "p95 of ours: {} ms cold, {} returning", [keys["cold_p95_ms"], keys["warm_p95_ms"]])
    assert keys["poisson_answers"] >= 100


def test_the_distance_to_the_limit(document, found):
    rows, keys = rows_of(document, "The distance to the limit"), found["all"]
    for label, name in (("cold", "cold"), ("returning", "warm")):
        shown = ("ms", "gemm_ms", "over_gemm", "over_limit")
        check(row(rows, label), [keys[f"{name}_{key}"] for key in shown])


def test_a_cpu_with_avx2_alone(document, found):
    rows, keys = rows_of(document, "A CPU with AVX2 alone"), found["avx2"]
    check(row(rows, "speeder-engine, fp32"), [keys["cold_ms"], 1, keys["warm_ms"], 1])
    small = [keys["int8_cold_ms"], 1 / keys["int8_over_bf16"], keys["int8_warm_ms"], 1 / keys["int8_over_bf16_warm"]]
    check(row(rows, "speeder-engine, int8"), small)
    without = contender(keys, "transformers_uncached", runs=False, warm=False)
    check(row(rows, "transformers, one token"), without)
    check(row(rows, "transformers, static"), contender(keys, "transformers_static", runs=False))
    check(row(rows, "ONNX Runtime"), contender(found["avx2 onnx"], "onnxruntime", runs=False))


def test_many_users(document, found):
    rows, keys = rows_of(document, "Many users"), found["all"]
    for size in (1, 4, 16, 64):
        figures = [(keys[f"users_s_{size}{suffix}"], keys[f"of_ceiling_{size}{suffix}"]) for suffix in ("_cold", "")]
        check(row(rows, str(size)), [*figures[0], *figures[1]])
    check(row(rows, "history positions"), [keys[f"hit_rate_{percent}"] for percent in (10, 25, 50, 100)])
    for label, event in (
        ("cold", "cold"),
        ("the same again", "same"),
        ("append", "append"),
        ("an append that moves", "slide"),
        ("an item in the middle", "correction"),
    ):
        costs = [keys[f"session_{event}_{length}_{unit}"] for length in (10, 50, 200) for unit in ("rows", "ms")]
        check(row(rows, label), costs)


def test_the_catalogue(document, found):
    rows, keys = rows_of(document, "The catalogue"), found["all"]
    check(row(rows, "speeder-engine"), [keys["catalogue_ms"], 1, keys["catalogue_ms_64"], 1])
    check(row(rows, "one read"), [keys["catalogue_read_ms"], 1 / keys["catalogue_over_read"]])
    both = [keys[f"catalogue_{key}{suffix}"] for suffix in ("", "_64") for key in ("torch_ms", "vs_torch")]
    check(row(rows, "torch"), both)
    half = [keys[f"catalogue_{key}{suffix}"] for suffix in ("", "_64") for key in ("faiss_half_ms", "vs_faiss_half")]
    check(row(rows, "faiss flat, bf16"), half)
    one = [keys["catalogue_faiss_ms"], keys["catalogue_vs_faiss"]]
    if "catalogue_faiss_runs_64" in keys:  # files from before have faiss's scan of a batch, which says nothing
        one += [keys["catalogue_faiss_ms_64"], keys["catalogue_vs_faiss_64"]]
    check(row(rows, "faiss flat, fp32"), one)


def test_what_each_trick_is_worth(document, found):
    rows = rows_of(document, "What each trick is worth")
    for label, name in TRICKS.items():
        check(row(rows, label)[-1:], [found["tricks"][f"without_{name}"]])


def test_figures_between_the_tables(document, found):
    keys, runtimes, narrow, catalogue = found["all"], found["runtimes"], found["avx2"], found["avx2 catalogue"]
    read, batch = keys["catalogue_over_read"], keys["plan_us_64"]
    for sentence, values in (
        ("--shape 0.5b` ({} minutes)", [keys["seconds"] / 60]),
        ("where ours took {} and {} ms", [runtimes["cold_ms"], runtimes["warm_ms"]]),
        ("Another run had {} and {} (the one", [runtimes["cold_over_gemm"], runtimes["warm_over_gemm"]]),
        ("{} x bf16 for a cold user, {} x for a", [keys["int8_over_bf16"], keys["int8_over_bf16_warm"]]),
        ("A step takes {} (cold) and {} (ret", [narrow["cold_over_gemm"], narrow["warm_over_gemm"]]),
        ("in oneDNN, {} and {} x the physical", [narrow["cold_over_limit"], narrow["warm_over_limit"]]),
        ("searched in {} ms for one user, {} x", [catalogue["catalogue_ms"], catalogue["catalogue_over_read"]]),
        ("and in {} s for 64", [catalogue["catalogue_ms_64"] / 1e3]),
        ("torch takes {} and {} times", [catalogue["catalogue_vs_torch"], catalogue["catalogue_vs_torch_64"]]),
        ("as long, faiss {} and {}, so", [catalogue["catalogue_vs_faiss"], catalogue["catalogue_vs_faiss_64"]]),
        ("in fp32, it takes {} of ours", [catalogue["catalogue_vs_faiss_64"]]),
        ("do nothing, it is {} ms on a Zen 3", [found["avx2 host"]["host_step_us_1"] / 1e3]),
        ("core, and {} us a user in steps of 64", [found["avx2 host"]["host_step_us_64"] / 64]),
        ("Zipf's law, {} % of the requests", [100 * keys["stream_returning"]]),
        ("64 at a time reaches {} users/s", [keys["closed_users_s"]]),
        ("p50 is {} ms, p95 {}, p99 {}.", [keys[f"poisson_p{percent}_ms"] for percent in (50, 95, 99)]),
        ("**{} x one read of the table**", [read]),
        ("planned in **{} us** (one native call; {} us among 50,000", [batch, keys["plan_us_64_of_50000"]]),
        ("256 in {} us; the block pool does {} million", [keys["plan_us_256"], keys["block_ops_per_s"] / 1e6]),
        ("is **{} ms** (`host_us`; {} in the", [keys["host_us"] / 1e3, runtimes["host_us"] / 1e3]),
        ("{} % of the request's {} ms", [keys["host_us"] / keys["warm_ms"] / 10, keys["warm_ms"]]),
        ("every position: {} supervised", [keys["train_targets_s"]]),
        ("LoRA on both: {}. **{} x**", [keys["train_text_targets_s"], keys["train_vs_text"]]),
        ("static cache takes {} x ours", [keys["vs_transformers_static_warm"]]),
        ("returning user, {} x for a cold one", [keys["vs_transformers_static"]]),
    ):
        says(document, sentence, values)


def test_the_readme_repeats_them(root, found):
    text, keys, narrow = (root / "README.md").read_text(), found["all"], found["avx2"]
    for sentence, values in (
        ("20 candidates take {} ms: {} x the physical limit", [keys["warm_ms"], keys["warm_over_limit"]]),
        ("{} x the step's own matrix products in oneDNN", [keys["warm_over_gemm"]]),
        ("{} times faster than writing a title", [keys["vs_text_generation_warm"]]),
        ("int8 weights take {} ms", [keys["int8_warm_ms"]]),
        ("alone take {} ms in fp32, {} in int8", [narrow["warm_ms"], narrow["int8_warm_ms"]]),
    ):
        says(text, sentence, values)
