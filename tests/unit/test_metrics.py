"""Measurements as CloudWatch and OpenTelemetry get them."""

import json

import pytest
from opentelemetry import metrics as opentelemetry_metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from dagster_taskiq.metrics import (
    DELIVERED,
    FINISHED,
    RUNNING,
    TO_FINAL,
    EmbeddedMetrics,
    Metrics,
    OpenTelemetryMetrics,
)


def test_cloudwatchs_embedded_format(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics([EmbeddedMetrics()], "tasks")
    metrics.put({FINISHED: 1, TO_FINAL: 0.25}, Outcome="canceled")
    line = json.loads(capsys.readouterr().out)
    assert (line["Queue"], line["Outcome"], line["CancellationsFinished"], line["SecondsToFinal"]) == (
        "tasks",
        "canceled",
        1,
        0.25,
    )
    (directive,) = line["_aws"]["CloudWatchMetrics"]
    assert directive["Namespace"] == "dagster-taskiq"
    assert sorted(map(sorted, directive["Dimensions"])) == [["Outcome", "Queue"], ["Queue"]]
    assert {metric["Name"]: metric["Unit"] for metric in directive["Metrics"]} == {
        "CancellationsFinished": "Count",
        "SecondsToFinal": "Seconds",
    }


def test_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(opentelemetry_metrics, "get_meter", lambda name, version: provider.get_meter(name, version))
    metrics = Metrics([OpenTelemetryMetrics()], "tasks")
    metrics.count(DELIVERED, Channel="cancel queue")
    metrics.count(DELIVERED, Channel="cancel queue")
    metrics.put({TO_FINAL: 0.25, RUNNING: 3})
    data = reader.get_metrics_data()
    assert data is not None
    found = {
        metric.name: metric.data.data_points[0]
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    delivered = found["dagster_taskiq.cancellations.delivered"]
    assert (delivered.value, dict(delivered.attributes or {})) == (2, {"queue": "tasks", "channel": "cancel queue"})  # type: ignore[union-attr]
    assert found["dagster_taskiq.cancellations.duration"].sum == 0.25  # type: ignore[union-attr]
    assert found["dagster_taskiq.work.running"].value == 3  # type: ignore[union-attr]
    provider.shutdown()


def test_by_default_only_on_ecs_or_with_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_taskiq.metrics._has_opentelemetry", lambda: False)
    assert not Metrics.chosen("auto", "q", on_ecs=False, stdout_is_a_log=True).wanted
    assert Metrics.chosen("auto", "q", on_ecs=True, stdout_is_a_log=True).wanted
    assert Metrics.chosen("emf", "q", on_ecs=False, stdout_is_a_log=True).wanted
    assert not Metrics.chosen("off", "q", on_ecs=True, stdout_is_a_log=True).wanted
    assert not Metrics.chosen("emf", "q", on_ecs=True, stdout_is_a_log=False).wanted
    monkeypatch.setattr("dagster_taskiq.metrics._has_opentelemetry", lambda: True)
    assert Metrics.chosen("auto", "q", on_ecs=False, stdout_is_a_log=True).wanted


def test_a_sink_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def put(self, values: object, attributes: object) -> None:
            raise OSError("no stdout")

    Metrics([Broken()], "q").count(DELIVERED)
    assert "metrics could not be written" in caplog.text
