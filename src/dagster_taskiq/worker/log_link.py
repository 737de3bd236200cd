"""Where a worker's log is to be read: an address in the console of CloudWatch. Pure.

Knows what the ECS agent says of a container's log driver, and the console's addresses; not who asks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

_CONSOLES: Final = {
    "aws-cn": "console.amazonaws.cn",
    "aws-us-gov": "console.amazonaws-us-gov.com",
}
_CONSOLE: Final = "console.aws.amazon.com"
_EARLIER_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class LogStream:
    """A stream of CloudWatch Logs."""

    partition: str
    """Of AWS: "aws", "aws-cn"."""
    region: str
    group: str
    name: str

    def of_run(self, run_id: str, since: float) -> str:
        """The address of those lines that name the run. `since`: seconds since the epoch; from a minute before it."""
        # The part behind the "#" is the console's own: it reads it as an address that was encoded twice, with $ for %.
        pattern = _once(f'"{run_id}"')
        search = f"?filterPattern={pattern}&start={int((since - _EARLIER_S) * 1000)}"
        return (
            f"https://{self.region}.{_CONSOLES.get(self.partition, _CONSOLE)}/cloudwatch/home?region={self.region}"
            f"#logsV2:log-groups/log-group/{_twice(self.group)}/log-events/{_twice(self.name)}{_dollars(search)}"
        )


def log_stream(container: Mapping[str, Any], partition: str, region: str) -> LogStream | None:
    """That of a container, by the agent's metadata version 4; None when its log is not in CloudWatch.

    `region`: that of the task, where the log driver has no other.
    """
    options = container.get("LogOptions")
    if container.get("LogDriver") != "awslogs" or not isinstance(options, dict):
        return None
    group, name = options.get("awslogs-group"), options.get("awslogs-stream")
    if not group or not name:
        return None
    return LogStream(partition, str(options.get("awslogs-region") or region), str(group), str(name))


def _once(text: str) -> str:
    return quote(text, safe="")


def _twice(text: str) -> str:
    return _dollars(_once(text))


def _dollars(text: str) -> str:
    return quote(text, safe="").replace("%", "$")
