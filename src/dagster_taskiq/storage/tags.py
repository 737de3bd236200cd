"""The run tags of this package: their names, and how to read them."""

import logging
from collections.abc import Mapping
from typing import Final

from dagster_taskiq.errors import SettingsError
from dagster_taskiq.settings import checked

logger = logging.getLogger(__name__)

TASK_ID_TAG: Final = "dagster-taskiq/task_id"
"""Set at launch: the taskiq task id of the run's work."""

GRACE_SECONDS_TAG: Final = "dagster-taskiq/grace_seconds"
"""May be set by users on a job or run: seconds between the interrupt and the kill, instead of the setting."""

CANCEL_REASON_TAG: Final = "dagster-taskiq/cancel_reason"
"""Set when somebody cancels a run with a reason."""

CANCELLED_BY_TAG: Final = "dagster-taskiq/cancelled_by"
"""Set when somebody cancels a run with an author."""


def grace_from_tag(value: str) -> float:
    """Seconds from the run tag `dagster-taskiq/grace_seconds`. Raises `SettingsError`."""
    return float(checked("grace_seconds", value))


def grace_of(tags: Mapping[str, str], default_s: float) -> float:
    """A run's own grace, if it has a tag with a valid one."""
    if GRACE_SECONDS_TAG not in tags:
        return default_s
    try:
        return grace_from_tag(tags[GRACE_SECONDS_TAG])
    except SettingsError as error:
        logger.warning("tag %s ignored: %s", GRACE_SECONDS_TAG, error)
        return default_s
