"""Several queues as one: the slots are never exceeded, nothing is lost, and what is preferred comes first.

The loop's clock jumps to the next moment at which something happens, so that seconds take no time.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq.tasks.preferred_queues import HEAD_START_S, PreferredQueues
from dagster_taskiq.tasks.slots import Slots

WAIT_S = 20.0
ANSWER_S = 0.02
"""An answer of a queue takes so long."""
SOON_S = 1e-4


class _Jumping(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing will ever happen any more"
        self.now += max(0.0, timeout)
        return super().select(0)


def run(body: Coroutine[Any, Any, None]) -> None:
    selector = _Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(body)


Message = tuple[int, int]
"""The queue, and a number."""


@dataclass
class World:
    """Queues, and a receiver as taskiq's: it has a slot before it asks for a message."""

    most: int
    takes_s: float = 1.0
    waiting: list[list[Message]] = field(default_factory=lambda: [[], []])
    kept: set[Message] = field(default_factory=set)
    at_work: set[Message] = field(default_factory=set)
    begun: list[Message] = field(default_factory=list)
    done: set[Message] = field(default_factory=set)
    back: list[Message] = field(default_factory=list)
    requests: list[tuple[float, int]] = field(default_factory=list)
    seen_at_release: list[set[Message]] = field(default_factory=list)
    """What waited whenever a slot became free."""
    began_at: dict[Message, float] = field(default_factory=dict)
    _came: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        self.slots = Slots(asyncio.Semaphore(self.most))

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def queue(self, number: int) -> Callable[[Callable[[], int]], Awaitable[Sequence[Message]]]:
        async def receive(at_most: Callable[[], int]) -> Sequence[Message]:
            self.requests.append((self.now, number))
            count = at_most()
            assert 1 <= count <= self.slots.free + 1
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S), self._came:
                    await self._came.wait_for(lambda: self.waiting[number])
            taken = [self.waiting[number].pop(0) for _ in range(min(count, len(self.waiting[number])))]
            await asyncio.sleep(ANSWER_S)
            self.kept.update(taken)
            return taken

        return receive

    async def put(self, *messages: Message) -> None:
        async with self._came:
            for message in messages:
                self.waiting[message[0]].append(message)
            self._came.notify_all()

    async def hand_back(self, messages: Sequence[Message]) -> None:
        self.back += messages
        self.kept.difference_update(messages)
        await self.put(*messages)

    async def receive(self, queues: PreferredQueues[Message]) -> None:
        working: set[asyncio.Task[None]] = set()
        async for message in self.slotted(queues):
            self.kept.discard(message)
            self.at_work.add(message)
            self.begun.append(message)
            self.began_at[message] = self.now
            task = asyncio.create_task(self.work(message))
            working.add(task)
            task.add_done_callback(working.discard)

    async def slotted(self, queues: PreferredQueues[Message]) -> Any:
        messages = queues.messages()
        try:
            while True:
                await self.slots.acquire()
                yield await asyncio.create_task(anext(messages))
        finally:
            await messages.aclose()

    async def work(self, message: Message) -> None:
        await asyncio.sleep(self.takes_s)
        self.at_work.discard(message)
        self.done.add(message)
        self.seen_at_release.append({one for queue in self.waiting for one in queue})
        self.slots.release()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10_000):
            while not condition():
                # When the clock moves, nothing is left to be done at the moment before.
                await asyncio.sleep(SOON_S * 371)
                assert len(self.kept) + len(self.at_work) <= self.most, (self.kept, self.at_work)


@contextmanager
def receiving(world: World, **options: Any) -> Iterator[PreferredQueues[Message]]:
    queues = PreferredQueues(
        [world.queue(number) for number in range(len(world.waiting))],
        world.hand_back,
        free=lambda: 1 + world.slots.free,
        **options,
    )
    receiver = asyncio.create_task(world.receive(queues))
    try:
        yield queues
    finally:
        receiver.cancel()


def of(slots: int, queues: int = 2, **more: Any) -> World:
    return World(slots, waiting=[[] for _ in range(queues)], **more)


@pytest.mark.parametrize("slots", [1, 3])
def test_the_preferred_queue_is_emptied_first(slots: int) -> None:
    async def body() -> None:
        world = of(slots, 3)
        await world.put(*((queue, number) for queue in range(3) for number in range(5)))
        with receiving(world):
            await world.until(lambda: len(world.done) == 15)
        assert [queue for queue, _ in world.begun] == [0] * 5 + [1] * 5 + [2] * 5
        assert not world.back

    run(body())


def test_what_comes_to_an_idle_receiver_begins_at_once_whatever_its_queue() -> None:
    async def body() -> None:
        world = of(9)
        with receiving(world):
            for number, at in enumerate((3.0, 19.9, 20.0, 20.3, 61.0)):
                await asyncio.sleep(at - world.now)
                await world.put((1, number))
                await world.until(lambda number=number: (1, number) in world.began_at)  # type: ignore[misc]
                assert world.began_at[1, number] - at <= 2 * ANSWER_S + SOON_S * 4000
            assert not world.back

    run(body())


def test_an_idle_receiver_asks_each_queue_once_in_the_time_of_a_long_poll() -> None:
    async def body() -> None:
        world = of(2, 3)
        with receiving(world):
            await asyncio.sleep(59)
        assert [sum(queue == number for _, queue in world.requests) for number in range(3)] == [3, 3, 3]

    run(body())


def test_a_receiver_without_a_free_slot_asks_for_nothing_and_keeps_nothing() -> None:
    async def body() -> None:
        world = of(1, takes_s=300.0)
        with receiving(world):
            await asyncio.sleep(1)
            await world.put((1, 0))
            await asyncio.sleep(1)
            await world.put((0, 0), (1, 1))
            await asyncio.sleep(1)
            assert world.back == [(0, 0)], "the poll that still waited had it"
            assert world.waiting == [[(0, 0)], [(1, 1)]]
            before = len(world.requests)
            await asyncio.sleep(200)
            assert len(world.requests) == before
            await world.until(lambda: len(world.begun) == 2)
            assert world.begun == [(1, 0), (0, 0)]

    run(body())


def test_a_preferred_queue_that_does_not_answer_stops_nobody() -> None:
    async def body() -> None:
        world = of(1)
        never = asyncio.Event()

        async def silent(_: Callable[[], int]) -> Sequence[Message]:
            await never.wait()
            return []

        queues = PreferredQueues([silent, world.queue(1)], world.hand_back, free=lambda: 1 + world.slots.free)
        receiver = asyncio.create_task(world.receive(queues))
        await world.put((1, 0))
        await world.until(lambda: world.begun == [(1, 0)])
        assert world.began_at[1, 0] <= HEAD_START_S + 2 * ANSWER_S + SOON_S * 4000
        receiver.cancel()

    run(body())


def test_nothing_is_asked_while_receiving_is_held() -> None:
    async def body() -> None:
        world, may = of(1), asyncio.Event()
        with receiving(world, may_receive=may.wait):
            await world.put((1, 0), (0, 0))
            await asyncio.sleep(60)
            assert not world.requests
            may.set()
            await world.until(lambda: len(world.begun) == 2)
            assert world.begun == [(0, 0), (1, 0)]

    run(body())


def test_what_a_poll_raises_ends_it_and_what_was_kept_goes_back() -> None:
    async def body() -> None:
        world = of(3)

        async def broken(_: Callable[[], int]) -> Sequence[Message]:
            await asyncio.sleep(5)
            raise ValueError("on purpose")

        queues = PreferredQueues([world.queue(0), broken], world.hand_back, free=lambda: 1 + world.slots.free)
        await world.put((0, 0), (0, 1), (0, 2))
        messages = queues.messages()
        await world.slots.acquire()
        assert await anext(messages) == (0, 0)
        assert await anext(messages) == (0, 1)
        await asyncio.sleep(6)
        await anext(messages)
        with pytest.raises(ValueError, match="on purpose"):
            await anext(messages)
        assert not world.back

        await world.put((0, 3), (0, 4))
        messages = PreferredQueues([world.queue(0)], world.hand_back, free=lambda: 1 + world.slots.free).messages()
        assert await anext(messages) == (0, 3)
        await messages.aclose()
        assert world.back == [(0, 4)]

    run(body())


@given(
    slots=st.integers(1, 4),
    takes_s=st.floats(0.01, 30),
    arrivals=st.lists(st.tuples(st.integers(0, 2), st.floats(0, 5)), min_size=1, max_size=25),
)
def test_slots_are_never_exceeded_nothing_is_lost_and_who_waits_with_preference_begins_first(
    slots: int, takes_s: float, arrivals: list[tuple[int, float]]
) -> None:
    async def body() -> None:
        world = of(slots, 3, takes_s=takes_s)
        with receiving(world):
            for number, (queue, pause_s) in enumerate(arrivals):
                await asyncio.sleep(pause_s)
                await world.put((queue, number))
            await world.until(lambda: len(world.done) == len(arrivals))
        assert sorted(number for _, number in world.begun) == [*range(len(arrivals))], "each once"
        for seen in world.seen_at_release:
            for preferred in seen:
                for other in seen:
                    if preferred[0] < other[0]:
                        assert world.began_at[preferred] <= world.began_at[other], (preferred, other)

    run(body())
