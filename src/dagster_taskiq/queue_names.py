"""The names of the queues that belong together: work, steps, cancels. Knows only texts."""

from typing import Final

_FIFO: Final = ".fifo"


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
