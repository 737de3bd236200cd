"""Several receivers of one message, with real concurrency: how many of them start it?"""

import threading
from collections import Counter
from collections.abc import Callable

from dagster import DagsterEventType, DagsterInstance

from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.event_log import StepRef
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.worker.admission import Action, Candidate, Decision, admit_run, admit_step
from tests.support.platform import Platform

RECEIVERS = 3
GIVES_WAY = {Action.DROP, Action.HAND_BACK}


def at_once(home: str, decide: Callable[[DagsterInstance, Claims, str], Decision]) -> list[Action]:
    """What receivers decide that begin at the same moment, each with its own connections."""
    barrier = threading.Barrier(RECEIVERS)
    actions: list[Action] = []

    def receive(name: str) -> None:
        with DagsterInstance.from_config(home) as instance:
            claims = Claims(instance, Heartbeats(instance, 60, 10))
            claims.heartbeats.beat(name)
            barrier.wait(30)
            actions.append(decide(instance, claims, name).action)

    threads = [threading.Thread(target=receive, args=(f"w{number}",)) for number in range(RECEIVERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(actions) == RECEIVERS
    return actions


def count_starts(platform: Platform, what: str, rounds: int) -> Counter[int]:
    """How many receivers started it, by how often that was so."""
    started: Counter[int] = Counter()
    for _ in range(rounds):
        run = platform.create("quick_job")
        platform.report(run, DagsterEventType.RUN_STARTING)
        if what == "step":
            platform.report(run, DagsterEventType.RUN_START)

        def decide(instance: DagsterInstance, claims: Claims, name: str, run_id: str = run.run_id) -> Decision:
            candidate = Candidate("execute_run" if what == "run" else "execute_step", run_id, "task", name, "here")
            if what == "run":
                return admit_run(instance, claims, candidate)
            return admit_step(instance, StepClaims(instance), StepRef("quick", "task"), candidate)

        actions = at_once(str(platform.home), decide)
        assert set(actions) <= {Action.START, *GIVES_WAY}, actions
        started[actions.count(Action.START)] += 1
    return started
