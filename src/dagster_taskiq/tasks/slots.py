"""The slots of a receiver: a semaphore that tells how many are free. Knows asyncio, not who takes them."""

import asyncio
from typing import Literal


class Slots(asyncio.Semaphore):
    """A semaphore that tells how often it can be acquired at once."""

    def __init__(self, like: asyncio.Semaphore) -> None:
        self.free = like._value  # noqa: SLF001 - taskiq's own, which it does not tell: it has a random part
        super().__init__(self.free)

    async def acquire(self) -> Literal[True]:
        """Take one; wait for it if need be."""
        await super().acquire()
        self.free -= 1
        return True

    def release(self) -> None:
        """Give it back."""
        self.free += 1
        super().release()
