"""What a worker makes of what is stored about it."""

import asyncio
import json
from dataclasses import asdict

from dagster_taskiq.storage.fleet import HOLD_KEY, Hold, StopRequest, stop_key
from dagster_taskiq.worker.orders import Orders


def stored(*, hold: Hold | None = None, stop: StopRequest | None = None) -> dict[str, str]:
    values = {HOLD_KEY: hold, stop_key("w-1"): stop}
    return {key: json.dumps(asdict(value)) for key, value in values.items() if value is not None}


def make(heard: list[StopRequest]) -> Orders:
    return Orders("w-1", heard.append, drain_s=15)


def test_nothing_may_begin_from_a_hold_to_its_release() -> None:
    asyncio.run(_a_hold_and_its_release())


async def _a_hold_and_its_release() -> None:
    orders = make([])
    await orders.may_begin()
    hold = Hold(1_000.0, "ada", "migration")
    orders.hear(stored(hold=hold))
    assert orders.news.is_set(), "others wait for its answer"
    assert orders.facts() == {"held": 1_000.0}
    waiting = asyncio.ensure_future(orders.may_begin())
    orders.news.clear()
    orders.hear(stored(hold=hold))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert not orders.news.is_set(), "that is known"
    orders.hear({})
    await waiting
    assert orders.facts() == {}


def test_each_request_to_stop_is_followed_once() -> None:
    heard: list[StopRequest] = []
    orders = make(heard)
    first, second = StopRequest(1.0, "ada", finish=True), StopRequest(2.0, "ada", "now")
    for values in ({}, stored(stop=first), stored(stop=first), stored(stop=second), {}, stored(stop=second)):
        orders.hear(values)
    assert heard == [first, second]
    assert orders.cause == "the worker stops, asked by ada: now"
    assert make([]).cause == "the worker stops"
    assert orders.was_asked_to_stop


def test_the_heartbeat_tells_who_stops_it_and_until_when() -> None:
    orders = make([])
    orders.stops("ada", "a larger machine", finish=True)
    assert orders.facts()["stopping"]["until"] is None
    orders.stops("a signal")
    stopping = orders.facts()["stopping"]
    assert (stopping["by"], stopping["until"] - stopping["at"]) == ("a signal", 15)
