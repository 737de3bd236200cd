"""How to go on when something fails again and again: say so once, wait ever longer, say when it is over. A leaf."""

import asyncio
import random
from logging import getLogger

logger = getLogger(__name__)


class Outage:
    """The failures in a row of one thing that is tried for ever."""

    def __init__(self, doing: str, *, first_s: float = 0.2, longest_s: float = 10.0) -> None:
        self._doing = doing
        self._first_s = first_s
        self._longest_s = longest_s
        self.tries = 0

    async def wait(self, error: BaseException) -> None:
        """Note a failure and wait, jittered, so that many workers do not return together."""
        if not self.tries:
            logger.warning("cannot %s, trying again: %s", self._doing, error)
        pause_s = min(self._longest_s, self._first_s * 2 ** min(self.tries, 16))
        self.tries += 1
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311  jitter, not a secret

    def over(self) -> None:
        """Note a success."""
        if self.tries:
            logger.warning("can %s again after %d tries", self._doing, self.tries)
            self.tries = 0
