"""Training: targets a second, one token an item beside titles as text, over the same body with the same LoRA."""

from baselines.base import Unavailable
from baselines.speeder_training import SpeederTraining
from baselines.text_training import TextTraining
from baselines.training_run import TrainingRun
from context import Bench
from measure import Clock, Timed, Timing, interleave, median_of

OURS, TEXT = SpeederTraining.key, TextTraining.key


def measure(bench: Bench, clock: Clock) -> None:
    """Batches of the size that each is trained with at ease: what is compared is targets a second, not steps."""
    try:
        runs: dict[str, TrainingRun] = {OURS: SpeederTraining(bench.subject), TEXT: TextTraining(bench.subject)}
    except Unavailable as error:
        bench.report.note(f"train: {error}")
        return
    targets: dict[str, dict[int, int]] = {name: {} for name in runs}

    def stepping(name: str) -> Timed:
        def call(at: int) -> None:
            targets[name][at] = runs[name].step()

        return Timed(call)

    timings = interleave({name: stepping(name) for name in runs}, bench.rounds(5, 6), clock, bench.device, warm_ups=1)
    rates = {name: targets_s(timings[name], targets[name]) for name in runs}
    bench.report.put("train_targets_s", median_of(rates[OURS].values()))
    bench.report.put("train_text_targets_s", median_of(rates[TEXT].values()))
    ratio = median_of(rates[OURS][at] / rates[TEXT][at] for at in rates[OURS])
    bench.report.put("train_vs_text", ratio)
    rows = [
        [runs[name].label, timings[name].p50 * 1e3, timings[name].count, median_of(rates[name].values())]
        for name in runs
    ]
    bench.report.table(f"{bench.subject_name}: training", ("", "step ms", "runs", "targets/s"), rows)


def targets_s(timing: Timing, targets: dict[int, int]) -> dict[int, float]:
    return {at: targets[at] / seconds for at, seconds in timing.seconds.items()}
