"""The names of the queues that belong together: work, steps, cancels; and those of a route. Knows only texts."""

import re
from typing import Final

_FIFO: Final = ".fifo"
DEFAULT_ROUTE: Final = "default"
"""What the unnamed route is called where somebody has to name it: its queues have no name of a route in theirs."""
_ROUTE: Final = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,28}[a-z0-9])?")
_TAKEN: Final = re.compile(r"(?:.*-)?(?:steps|cancels)")
"""The queue of such a route would be the steps queue or the cancel queue of another one."""
ROUTE_RULE: Final = (
    "1 to 30 lower-case letters, digits, hyphens and underscores, a letter or digit at both ends,"
    " and neither steps nor cancels as the last word"
)


def queue_name(queue_url: str) -> str:
    """The last part of the URL."""
    return queue_url.rstrip("/").rsplit("/", 1)[-1]


def is_fifo(queue_url: str) -> bool:
    """Whether the queue is a FIFO queue: on AWS, those and no others have names that end in `.fifo`."""
    return queue_url.rstrip("/").endswith(_FIFO)


def sibling_queue(queue_url: str, suffix: str) -> str:
    """The URL of the queue that belongs to a work queue: the suffix comes before `.fifo`, if there is one."""
    url = queue_url.rstrip("/")
    return f"{url.removesuffix(_FIFO)}{suffix}{_FIFO}" if url.endswith(_FIFO) else f"{url}{suffix}"


def steps_queue_url(queue_url: str) -> str:
    """`name` has `name-steps`, `name.fifo` has `name-steps.fifo`."""
    return sibling_queue(queue_url, "-steps")


def cancel_queue_url(queue_url: str) -> str:
    """`name` has `name-cancels`, `name.fifo` has `name-cancels.fifo`."""
    return sibling_queue(queue_url, "-cancels")


def is_route(value: object) -> bool:
    """Whether that may be the name of a route, the unnamed one's included. `ROUTE_RULE` says it in words."""
    return isinstance(value, str) and _ROUTE.fullmatch(value) is not None and _TAKEN.fullmatch(value) is None


def route_queue_url(queue_url: str, route: str) -> str:
    """The URL of a route's work queue: that of the unnamed route and `-<route>`; its siblings follow from it."""
    return queue_url.rstrip("/") if route == DEFAULT_ROUTE else sibling_queue(queue_url, f"-{route}")
