"""The tills of the four shops. They stand for somebody's slow API: no network, the same receipts for the same day."""

import random
import time
from collections.abc import Iterator

SHOPS = ("Bridge Street", "Market", "Station", "University")
PRICES = {"rye bread": 480, "baguette": 260, "croissant": 190, "pretzel": 110, "apple cake": 340}
PAGES = 100
RECEIPTS_PER_PAGE = 20

Receipt = tuple[str, str, int, int]
"""Shop, article, how many, cents."""


def pages(day: str, seconds: float) -> Iterator[list[Receipt]]:
    """All receipts of a day, page by page; the last page is there after so many seconds."""
    chance = random.Random(day)  # noqa: S311 - invented, not secret
    for number in range(PAGES):
        time.sleep(seconds / PAGES)
        shop = SHOPS[number * len(SHOPS) // PAGES]
        yield [_receipt(shop, chance) for _ in range(RECEIPTS_PER_PAGE)]


def _receipt(shop: str, chance: random.Random) -> Receipt:
    article, count = chance.choice(sorted(PRICES)), chance.randint(1, 6)
    return shop, article, count, count * PRICES[article]
