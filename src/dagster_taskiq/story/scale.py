"""Where moments are on a picture, and round numbers for its axis. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from dagster_taskiq.story.text import duration

_STEPS_S: Final = (
    *(base * 10.0**power for power in range(-3, 1) for base in (1, 2, 5)),
    *(10, 20, 30, 60, 120, 300, 600, 1_200, 1_800, 3_600, 7_200, 14_400, 28_800, 43_200),
    *(86_400.0 * days for days in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)),
)


@dataclass(frozen=True, slots=True)
class Scale:
    """From seconds since the epoch to a place between 0 and `width`."""

    first: float
    last: float
    width: float

    def place(self, at: float) -> float:
        """Never outside."""
        return min(max((at - self.first) / (self.last - self.first), 0.0), 1.0) * self.width

    def ticks(self, most: int) -> Iterator[tuple[float, str]]:
        """Place and label of round durations since the first moment: `most` of them, or fewer."""
        span = self.last - self.first
        step = next((step for step in _STEPS_S if span / step <= most), span / most)
        for number in range(int(span / step + 1e-9) + 1):
            yield self.place(self.first + number * step), "0" if not number else duration(number * step)
