"""Traffic: a stream of users sent through `Engine.submit`, as a service would, closed or open."""

import asyncio
import time
from dataclasses import dataclass, field

from measure import Timing
from ours import Ours
from workload import BenchUser, Stream

from speeder_engine.errors import QueueFull


@dataclass
class Served:
    """What a stretch of traffic came to. Latencies count from when a request was due, not from when it was sent."""

    latency: Timing = field(default_factory=Timing)  # by the number of the request
    seconds: float = 0.0  # from the first request to the last answer
    num_refused: int = 0

    @property
    def users_s(self) -> float:
        return self.latency.count / self.seconds


class Driver:
    """Sends a stream's users to an engine."""

    def __init__(self, ours: Ours, stream: Stream) -> None:
        self.ours, self.stream = ours, stream

    def closed(self, concurrency: int, seconds: float) -> Served:
        """`concurrency` requests wait at any time; nothing new is sent once `seconds` are over."""
        return asyncio.run(self._closed(concurrency, seconds))

    def poisson(self, rate: float, seconds: float) -> Served:
        """Requests come at `rate` a second on average, whatever is waiting already."""
        return asyncio.run(self._poisson(rate, seconds))

    async def _closed(self, concurrency: int, seconds: float) -> Served:
        served, users, started = Served(), self.stream.closed(concurrency), time.perf_counter()

        async def client() -> None:
            while (now := time.perf_counter()) < started + seconds:
                think, user = next(users)
                await asyncio.sleep(think)
                await self._ask(user, now + think, served)

        await asyncio.gather(*(client() for _ in range(concurrency)))
        served.seconds = time.perf_counter() - started
        return served

    async def _poisson(self, rate: float, seconds: float) -> Served:
        served, started, sent = Served(), time.perf_counter(), []
        for at, user in self.stream.arrivals(rate, seconds):
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            sent.append(asyncio.create_task(self._ask(user, started + at, served)))
        await asyncio.gather(*sent)
        served.seconds = time.perf_counter() - started
        return served

    async def _ask(self, user: BenchUser, due: float, served: Served) -> None:
        try:
            await self.ours.engine.submit(self.ours.request(user, user.history, user.user_id))
        except QueueFull:
            served.num_refused += 1
            return
        served.latency.seconds[served.latency.count] = time.perf_counter() - due
