"""AWS IAM and STS on loopback, as far as `doctor` asks them: who am I, which role is that, what may it do?

    with iam_server(caller="arn:aws:sts::123456789012:assumed-role/workers/i-1") as iam:
        iam.denied["sqs:SendMessage", "tasks-steps"] = "implicitDeny"     # action, end of the resource's ARN
        iam.refused.add("SimulatePrincipalPolicy")                       # AccessDenied

Set `AWS_ENDPOINT_URL_IAM` and `AWS_ENDPOINT_URL_STS` to its URL. What is not denied is allowed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qsl


@dataclass
class FakeIam:
    """What it answers, and what it was asked."""

    caller: str
    path: str = "/"
    url: str = ""
    denied: dict[tuple[str, str], str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    hangs: bool = False
    simulated: set[tuple[str, str, str]] = field(default_factory=set)
    """Source, action and resource of each decision that was asked for."""
    over: Event = field(default_factory=Event)

    def answer(self, asked: Mapping[str, str]) -> str:
        """The inner part of the answer to one request, as XML."""
        if asked["Action"] == "GetCallerIdentity":
            return f"<Arn>{self.caller}</Arn><UserId>AROA:x</UserId><Account>{self.caller.split(':')[4]}</Account>"
        if asked["Action"] == "GetRole":
            name = asked["RoleName"]
            arn = f"arn:aws:iam::123456789012:role{self.path}{name}"
            made = "<CreateDate>2026-01-01T00:00:00Z</CreateDate>"
            return f"<Role><Path>{self.path}</Path><RoleName>{name}</RoleName><Arn>{arn}</Arn>{made}</Role>"
        if self.hangs:
            self.over.wait(60)
        return (
            f"<IsTruncated>false</IsTruncated><EvaluationResults>{''.join(self._decisions(asked))}</EvaluationResults>"
        )

    def _decisions(self, asked: Mapping[str, str]) -> Iterator[str]:
        for name, action in asked.items():
            if name.startswith("ActionNames.member."):
                resource = asked["ResourceArns.member.1"]
                self.simulated.add((asked["PolicySourceArn"], action, resource))
                denials = [
                    said for (what, end), said in self.denied.items() if what == action and resource.endswith(end)
                ]
                said = next(iter(denials), "allowed")
                named = f"<EvalActionName>{action}</EvalActionName><EvalResourceName>{resource}</EvalResourceName>"
                yield f"<member>{named}<EvalDecision>{said}</EvalDecision></member>"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        iam: FakeIam = self.server.iam  # type: ignore[attr-defined]
        asked = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
        action = asked["Action"]
        if action in iam.refused:
            status = 403
            why = f"<Code>AccessDenied</Code><Message>not authorized to perform iam:{action}</Message>"
            whole = f"<ErrorResponse><Error><Type>Sender</Type>{why}</Error></ErrorResponse>"
        else:
            status = 200
            whole = f"<{action}Response><{action}Result>{iam.answer(asked)}</{action}Result></{action}Response>"
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole.encode())
        except OSError:
            return  # who asked no longer waits

    def log_message(self, *_: Any) -> None:
        """Not on stderr."""


@contextmanager
def iam_server(caller: str, path: str = "/") -> Iterator[FakeIam]:
    """Start it; it is gone afterwards. `path`: of the caller's role."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        iam = FakeIam(caller, path, f"http://127.0.0.1:{server.server_port}")
        server.iam = iam  # type: ignore[attr-defined]
        serving = Thread(target=server.serve_forever, name="iam")
        serving.start()
        try:
            yield iam
        finally:
            iam.over.set()
            server.shutdown()
            serving.join()
