"""The examples, each cancelled in the middle; afterwards nothing of it is left in the outside world."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg2  # type: ignore[import-untyped]
import pytest
from dagster import DagsterRunStatus
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository
from tests.acceptance.conftest import open_platform
from tests.support.moto import aws_client
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import GRACE_SECONDS_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

EXAMPLES = Path(__file__).parents[3] / "examples"
POLITELY, KILLED = "10", "0"
"""Seconds of grace: with none, there is only what the cleanup handler does."""


BAKERY = "dagster_taskiq.examples.bakery.definitions"


def launch(platform: Platform, file: str, job: str, op: str, config: Mapping[str, Any], grace: str) -> str:
    recon = ReconstructableJob.for_file(str(EXAMPLES / file), job)
    run = platform.instance.create_run_for_job(
        recon.get_definition(),
        run_config={"ops": {op: {"config": dict(config)}}},
        tags={GRACE_SECONDS_TAG: grace, "marks": ""},
        job_code_origin=recon.get_python_origin(),
    )
    platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
    return run.run_id


def cancelled_in_the_middle(platform: Platform, run_id: str, in_the_middle: Callable[[], object]) -> None:
    wait_until(in_the_middle, "it is at work", within=60, seen=lambda: platform.story(run_id))
    assert platform.launcher.terminate(run_id)
    assert platform.finished(run_id, within=60) is DagsterRunStatus.CANCELED, platform.story(run_id)
    platform.assert_nothing_left(run_id)


@contextlib.contextmanager
def working(endpoint: str, **environ: str) -> Iterator[Platform]:
    with open_platform(endpoint) as platform, platform.worker("-n", "w", env=environ):
        yield platform


@pytest.mark.parametrize("grace", [POLITELY, KILLED], ids=["politely", "killed"])
def test_an_upload_to_s3(endpoint: str, grace: str) -> None:
    s3 = aws_client("s3", endpoint)
    s3.create_bucket(Bucket="reports")

    def uploads() -> list[Any]:
        return list(s3.list_multipart_uploads(Bucket="reports").get("Uploads", []))

    def parts() -> object:
        return uploads() and s3.list_parts(Bucket="reports", Key="report", UploadId=uploads()[0]["UploadId"]).get(
            "Parts"
        )

    with working(endpoint, AWS_ENDPOINT_URL_S3=endpoint) as platform:
        run_id = launch(platform, "abort_upload.py", "upload_report", "upload", {"bucket": "reports"}, grace)
        cancelled_in_the_middle(platform, run_id, parts)
    assert uploads() == []
    assert "Contents" not in s3.list_objects_v2(Bucket="reports")


@pytest.mark.parametrize("grace", [POLITELY, KILLED], ids=["politely", "killed"])
def test_temporary_files(endpoint: str, tmp_path: Path, grace: str) -> None:
    with working(endpoint) as platform:
        config = {"folder": str(tmp_path)}
        run_id = launch(platform, "temporary_files.py", "sort_files", "sort_outside_of_memory", config, grace)
        cancelled_in_the_middle(platform, run_id, lambda: len(list(tmp_path.glob("chunks-*/*"))) > 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.postgres
@pytest.mark.parametrize("grace", [POLITELY, KILLED], ids=["politely", "killed"])
def test_a_transaction(endpoint: str, postgres: str, grace: str) -> None:
    url = postgres.replace("+psycopg2", "")
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute("CREATE TABLE imported (number INTEGER)")

        def asked(query: str) -> Any:
            cursor.execute(query)
            return cursor.fetchone()[0]

        sleeping = (
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(%'"
            " AND state = 'active' AND datname = current_database()"
        )
        with working(endpoint, DATABASE_URL=url) as platform:
            run_id = launch(platform, "transaction.py", "import_everything", "import_rows", {}, grace)
            cancelled_in_the_middle(platform, run_id, lambda: asked(sleeping))
            assert asked(sleeping) == 0
            assert asked("SELECT count(*) FROM imported") == 0
            assert (Stage.KILLED in platform.stages(run_id)) == (grace == KILLED)


def test_a_subprocess(endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "crawled"
    with working(endpoint) as platform:
        config = {"file": str(file)}
        run_id = launch(platform, "subprocess_stopped.py", "crawl_everything", "crawl", config, POLITELY)
        cancelled_in_the_middle(platform, run_id, lambda: file.exists() and len(file.read_text().splitlines()) > 3)
    assert file.read_text().splitlines()[-1] == "closed properly"
    told = [one for one in Path("/proc").glob("[0-9]*/cmdline") if str(file).encode() in _read(one)]
    assert told == [], [int(one.parts[2]) for one in told]


@pytest.mark.parametrize("grace", [POLITELY, KILLED], ids=["politely", "killed"])
def test_half_a_file_of_the_bakery(endpoint: str, grace: str) -> None:
    recon = ReconstructableRepository.for_module(BAKERY, "defs").get_reconstructable_job("day")
    with working(endpoint) as platform:
        files = Path(platform.instance.storage_directory()).parent / "bakery" / "receipts"
        run = platform.instance.create_run_for_job(
            recon.get_definition(),
            tags={GRACE_SECONDS_TAG: grace, "marks": "", "dagster/partition": "2025-01-07"},
            job_code_origin=recon.get_python_origin(),
        )
        platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
        cancelled_in_the_middle(platform, run.run_id, lambda: list(files.glob("*.part")))
        assert list(files.iterdir()) == []
        assert any(entry.message.startswith("removed ") for entry in platform.instance.all_logs(run.run_id))


def _read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def test_every_example_is_tested() -> None:
    told = Path(__file__).read_text()
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert files
    assert all(f'"{name}"' in told for name in files), files
