"""Many users: batches of cold and of returning ones, and traffic through `Engine.submit`."""

from dataclasses import dataclass

from context import Bench
from drive import Driver, Served
from energy import metered
from gemm import step_products, work_of
from measure import Clock, Timed, Timing, interleave, median_of
from ours import Ours
from workload import BenchUser, Stream

from speeder_engine import Request

BATCHES = (1, 4, 16, 64)
PROBES = 10  # products of the matmul ceiling in a row: about half a second
LONGER = 19  # items that a history grows by before the batch starts again: the window doesn't slide
LOAD = 0.7  # of what the closed loop reached
CONCURRENCY = 64
STREAM_USERS = 400


def measure(bench: Bench, clock: Clock) -> None:
    ours = Ours(bench.subject)
    try:
        users = bench.users(max(BATCHES))
        ours.answer(users[0])
        rows = [row for warm in (False, True) for row in batches(bench, ours, users, warm, Clock.of(clock.left * 0.4))]
        columns = ("", "p50 ms", "runs", "users/s", "rows/s", "of matmul ceiling")
        bench.report.table(f"{bench.subject_name}: batches", columns, rows)
        fractions = [bench.report.values[f"of_ceiling_64{suffix}"] for suffix in ("", "_cold")]
        bench.report.put("throughput_of_ceiling", min(float(each or 0) for each in fractions))
        traffic(bench, ours, clock)
    finally:
        ours.close()


@dataclass(frozen=True)
class Growing:
    """A batch whose users append an item a round. `before` a round everything but that item is in their sessions."""

    ours: Ours
    users: list[BenchUser]
    items: tuple[int, ...]  # what they append

    def requests(self, length: int) -> list[Request]:
        return [self.ours.request(user, (*user.history, *self.items[:length]), user.user_id) for user in self.users]

    @property
    def timed(self) -> Timed:
        def before(at: int) -> None:
            self.ours.engine.recommend_many(self.requests(at % LONGER))

        return Timed(lambda at: self.ours.engine.recommend_many(self.requests(at % LONGER + 1)), before)


def strangers(ours: Ours, users: list[BenchUser]) -> Timed:
    return Timed(lambda _: ours.engine.recommend_many(map(ours.cold_request, users)))


def batches(bench: Bench, ours: Ours, users: list[BenchUser], warm: bool, clock: Clock) -> list[list[object]]:
    """Batches of every size in turn, with the probe of the matmul ceiling between them."""
    timed: dict[str, Timed] = {}
    for size in BATCHES:
        taken = users[:size]
        if warm:
            timed[str(size)] = Growing(ours, taken, users[-1].candidates[:LONGER]).timed
        else:
            timed[str(size)] = strangers(ours, taken)
    probe = bench.limits.probes[bench.limits.matmul(bench.dtype)].repeated(bench.rounds(1, PROBES))
    # the first of a large shape takes as long as the others, and that is long
    timings = interleave(
        {**timed, "": probe.timed}, bench.rounds(9, 8), clock, bench.device, bench.rounds(1, 0), bench.pause
    )
    rates = {at: probe.amount / seconds for at, seconds in timings[""].seconds.items()}
    return [put_batch(bench, size, warm, timings[str(size)], rates) for size in BATCHES]


def put_batch(bench: Bench, size: int, warm: bool, timing: Timing, rates: dict[int, float]) -> list[object]:
    """rates: of the matmul ceiling, operations a second by round."""
    each = bench.workload.warm_rows if warm else bench.workload.cold_rows
    products = step_products(bench.subject.model.decoder, size * each, size * bench.workload.warm_rows)
    flops = work_of(products).flops
    of_ceiling = median_of(flops / seconds / rates[at] for at, seconds in timing.seconds.items())
    suffix = f"{size}" if warm else f"{size}_cold"
    bench.report.put(f"users_s_{suffix}", size / timing.p50)
    bench.report.put(f"rows_s_{suffix}", size * each / timing.p50)
    bench.report.put(f"of_ceiling_{suffix}", of_ceiling)
    name = f"{size} {'returning, 1 + 20 rows' if warm else 'cold, 30 + 20 rows'}"
    return [name, timing.p50 * 1e3, timing.count, size / timing.p50, size * each / timing.p50, of_ceiling]


def traffic(bench: Bench, ours: Ours, clock: Clock) -> None:
    """A closed loop as fast as it goes, then Poisson arrivals at a part of that; the users' sessions are kept."""
    stream = Stream(STREAM_USERS, bench.subject.num_items, bench.workload, seed=1)
    driver, seconds = Driver(ours, stream), min(bench.rounds(2, 20), clock.left / 2)
    if seconds <= 0:
        bench.report.note("throughput: no time was left for traffic")
        return
    driver.closed(CONCURRENCY, seconds / 4)  # sessions and threads as they are under way
    with metered(bench.device) as energy:
        closed = driver.closed(CONCURRENCY, seconds)
    rows = [put_served(bench, "closed", f"closed loop, {CONCURRENCY} at a time", closed)]
    if energy.joules is not None:
        bench.report.put("joules_per_user", energy.joules / closed.latency.count)
    rate = LOAD * closed.users_s
    opened = driver.poisson(rate, seconds)
    if opened.latency.count:
        rows.append(put_served(bench, "poisson", f"Poisson, {rate:.3g} a second", opened))
    bench.report.put("stream_returning", stream.returning_share)
    columns = ("", "users/s", "p50 ms", "p95", "p99", "answers", "refused")
    bench.report.table(f"{bench.subject_name}: traffic, histories of all lengths", columns, rows)


def put_served(bench: Bench, key: str, label: str, served: Served) -> list[object]:
    latency = served.latency
    bench.report.put(f"{key}_users_s", served.users_s)
    for name, value in latency.milliseconds.items():
        bench.report.put(f"{key}_{name}_ms", value)
    bench.report.put(f"{key}_answers", latency.count)
    return [label, served.users_s, *latency.cells(1e3), served.num_refused]
