"""Settings: configuration over environment over default, and errors that say what to do."""

import dataclasses
from typing import Any

import pytest

from dagster_taskiq.errors import SettingsError
from dagster_taskiq.settings import SOURCE_KEYS, Settings
from dagster_taskiq.sqs.lease import RENEWALS
from dagster_taskiq.storage.tags import GRACE_SECONDS_TAG, grace_from_tag, grace_of

URL = "https://sqs.eu-central-1.amazonaws.com/123456789012/dagster-tasks"


def read(config: dict[str, Any], environ: dict[str, str] | None = None, **overrides: Any) -> Settings:
    return Settings.from_config(config, environ=environ or {}, **overrides)


def source(**values: Any) -> dict[str, Any]:
    return {"queue_url": URL, "config_source": values}


def test_a_queue_url_is_enough() -> None:
    settings = read({"queue_url": URL})
    assert settings.region_name == "eu-central-1"
    assert settings.enable_cancellation
    assert settings.endpoint_url is None


def test_configuration_over_environment_over_default() -> None:
    environ = {
        "DAGSTER_TASKIQ_SQS_QUEUE_URL": URL + "-from-environment",
        "DAGSTER_TASKIQ_SQS_ENDPOINT_URL": "http://127.0.0.1:4566",
        "DAGSTER_TASKIQ_ENABLE_CANCELLATION": "0",
        "AWS_REGION": "eu-west-1",
        "AWS_DEFAULT_REGION": "eu-west-2",
    }
    from_environment = read({}, environ)
    assert from_environment.queue_url == URL + "-from-environment"
    assert from_environment.endpoint_url == "http://127.0.0.1:4566"
    assert from_environment.region_name == "eu-west-1"
    assert not from_environment.enable_cancellation

    config = source(enable_cancellation=True) | {"region_name": "us-east-1", "endpoint_url": "http://127.0.0.1:1"}
    from_configuration = read(config, environ)
    assert from_configuration.queue_url == URL
    assert from_configuration.endpoint_url == "http://127.0.0.1:1"
    assert from_configuration.region_name == "us-east-1"
    assert from_configuration.enable_cancellation


def test_flags_win_over_all_and_absent_flags_do_not() -> None:
    config = source(max_concurrent_runs=2, grace_seconds=5)
    settings = read(config, max_concurrent_runs=7, grace_seconds=None)
    assert (settings.max_concurrent_runs, settings.grace_seconds) == (7, 5)


def test_none_in_the_configuration_means_default() -> None:
    assert read(source(wait_time_seconds=None)).wait_time_seconds == 20


@pytest.mark.parametrize(("text", "meaning"), [("1", True), ("true", True), ("off", False), ("No", False)])
def test_switches_are_read_as_people_write_them(text: str, meaning: bool) -> None:
    assert read({"queue_url": URL}, {"DAGSTER_TASKIQ_ENABLE_CANCELLATION": text}).enable_cancellation is meaning


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "no queue: set queue_url"),
        ({"queue_url": "http://127.0.0.1:9/1/tasks"}, "no region: set region_name"),
        ({"queue_url": "dagster-tasks", "region_name": "us-east-1"}, "queue_url must be a URL"),
        ({"queue_url": "https://sqs.us-east-1.amazonaws.com/"}, "must end with the queue's name"),
        ({"queue_url": URL, "region_name": "Frankfurt!"}, "region_name must be the name of an AWS region"),
        ({"queue_url": URL, "endpoint_url": "localhost:4566"}, "endpoint_url must be a URL"),
        ({"queue_ulr": URL}, "did you mean 'queue_url'?"),
        ({"queue_url": URL, "grace_seconds": 5}, "'grace_seconds' belongs into config_source"),
        (source(queue_url=URL), "'queue_url' belongs beside config_source"),
        (source(grace_secnds=5), "did you mean 'grace_seconds'?"),
        (source(xyzzy="green"), "known are: "),
        ({"queue_url": URL, "config_source": ["grace_seconds"]}, "config_source must be a mapping"),
        (source(grace_seconds=-1), "grace_seconds must be between 0 and 3600 seconds, not -1"),
        (source(grace_seconds="soon"), "grace_seconds must be a number of seconds, not 'soon'"),
        (source(grace_seconds=True), "grace_seconds must be a number of seconds, not True"),
        (source(grace_seconds=float("nan")), "grace_seconds must be between"),
        (source(wait_time_seconds=21), "wait_time_seconds must be between 0 and 20 seconds"),
        (source(wait_time_seconds=1.5), "wait_time_seconds must be a whole number of seconds"),
        (source(wait_time_seconds=float("inf")), "wait_time_seconds must be"),
        (source(max_number_of_messages=0), "max_number_of_messages must be between 1 and 10 messages"),
        (source(max_concurrent_runs=-1), "max_concurrent_runs must be between 0 and 1000 runs"),
        (source(max_concurrent_steps=1001), "max_concurrent_steps must be between 0 and 1000 steps"),
        (source(max_concurrent_runs=0, max_concurrent_steps=0), "are both 0"),
        (source(payload_bucket="No_Bucket"), "payload_bucket must be the name of an S3 bucket"),
        (source(visibility_timeout_seconds=0), "visibility_timeout_seconds must be between 4 and 43200 seconds"),
        (source(status_poll_seconds=0), "status_poll_seconds must be between 0.2 and 300 seconds"),
        (source(enable_cancellation="maybe"), "enable_cancellation must be true or false, not 'maybe'"),
        (source(start_method="fork"), "start_method must be 'forkserver' or 'spawn'"),
        (source(preload_modules="my.module"), "preload_modules must be a list of module names"),
        (source(drain_seconds=30, stop_timeout_seconds=30), "drain_seconds (30) must be less than stop_timeout"),
        (source(cancel_ttl=10, status_poll_seconds=10), "cancel_ttl (10) must be greater than status_poll_seconds"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_to_do(config: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read(config)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_grace_period_has_to_fit_into_dagsters_cancel_timeout() -> None:
    settings = read(source(grace_seconds=30, status_poll_seconds=5))
    settings.check_against_cancel_timeout(180)
    settings.check_against_cancel_timeout(0)  # off
    with pytest.raises(SettingsError, match=r"run_monitoring\.cancel_timeout_seconds \(35\)"):
        settings.check_against_cancel_timeout(35)


def test_what_follows_from_the_visibility_timeout_is_in_the_order_that_is_safe() -> None:
    settings = read(source(visibility_timeout_seconds=30))
    a_lost_worker_is_received_again_after = settings.visibility_timeout_seconds * (1 - 1 / RENEWALS)
    assert settings.heartbeat_every_s < settings.dead_after_s < a_lost_worker_is_received_again_after


def test_a_shutdown_leaves_time_before_the_container_is_killed() -> None:
    assert read(source(drain_seconds=15, stop_timeout_seconds=30, grace_seconds=30)).shutdown_grace_s == 13
    assert read(source(drain_seconds=29, stop_timeout_seconds=30)).shutdown_grace_s == 0


def test_a_grace_tag_is_checked_as_the_setting_is() -> None:
    assert grace_from_tag("2.5") == 2.5
    with pytest.raises(SettingsError, match="grace_seconds must be a number"):
        grace_from_tag("two")


def test_the_original_keys_are_known() -> None:
    original = {"enable_cancellation", "is_fair_queue", "wait_time_seconds", "max_number_of_messages"}
    assert original <= set(SOURCE_KEYS)


def test_an_executor_may_say_otherwise_than_its_launcher() -> None:
    launcher = read(source(grace_seconds=7))
    assert launcher.overridden_by({}) == launcher
    other = launcher.overridden_by({**source(payload_bucket="big"), "queue_url": URL + "-other"})
    assert other == dataclasses.replace(launcher, queue_url=URL + "-other", payload_bucket="big")
    assert other.steps_queue_url == URL + "-other-steps"
    assert launcher.overridden_by({"queue_url": None, "config_source": None}, grace_seconds=None) == launcher
    assert launcher.overridden_by({}, grace_seconds=1.5).grace_seconds == 1.5
    for wrong in ({"queue": "x"}, source(grace=1), {"config_source": "x"}):
        with pytest.raises(SettingsError):
            launcher.overridden_by(wrong)


def test_a_run_has_its_own_grace_if_its_tag_makes_sense() -> None:
    assert grace_of({}, 30) == 30
    assert grace_of({GRACE_SECONDS_TAG: "2.5"}, 30) == 2.5
    assert grace_of({GRACE_SECONDS_TAG: "soon"}, 30) == 30


def test_a_run_waits_for_its_steps_longer_than_they_may_take() -> None:
    settings = read(source(status_poll_seconds=5))
    assert settings.steps_patience_s(30) > 30 + settings.status_poll_seconds


def test_a_worker_that_serves_no_queue_is_refused() -> None:
    assert read(source(max_concurrent_runs=0, max_concurrent_steps=1)).max_concurrent_runs == 0
    with pytest.raises(SettingsError, match="max_concurrent_runs"):
        read(source(max_concurrent_runs=0, max_concurrent_steps=0))
