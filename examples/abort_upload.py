"""A multipart upload to S3 that leaves nothing behind when it is cancelled, not even when its process is killed.

S3 keeps the parts of an upload that was neither completed nor aborted, invisible and at full price. So the id of the
upload is noted in the token's state before the first part is sent, and the cleanup handler aborts by it.

    dagster-taskiq dev -f examples/abort_upload.py
"""

import time
from collections.abc import Iterator

import boto3
import dagster as dg
from botocore.exceptions import ClientError

from dagster_taskiq import CleanupContext, cancellation_token, on_cancel

PART_BYTES = 5 * 1024 * 1024  # the least that S3 takes for any but the last part


class Upload(dg.Config):
    bucket: str
    key: str = "report"
    parts: int = 1000
    seconds_per_part: float = 0.1


def abort_upload(context: CleanupContext) -> None:
    """May be called twice, and when nothing was begun: so it bears that there is no such upload."""
    upload_id = context.state.get("upload_id")
    if upload_id is None:
        return
    bucket, key = context.op_config["bucket"], context.op_config["key"]
    try:
        boto3.client("s3").abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchUpload":
            raise
    context.log.info("aborted the upload of %s to %s", key, bucket)


def rendered(config: Upload) -> Iterator[bytes]:
    """The parts; they take a while."""
    for number in range(config.parts):
        time.sleep(config.seconds_per_part)
        yield bytes([number % 256]) * PART_BYTES


@dg.op
@on_cancel(abort_upload, retry_policy=dg.RetryPolicy(max_retries=9, delay=1), timeout=30)
def upload(context: dg.OpExecutionContext, config: Upload) -> None:
    """Upload the parts, complete the upload, never half of it."""
    s3, token = boto3.client("s3"), cancellation_token()
    where = {"Bucket": config.bucket, "Key": config.key}
    with token.shield():  # nobody stops us between the two
        upload_id = s3.create_multipart_upload(**where)["UploadId"]
        token.state["upload_id"] = upload_id
    parts = []
    for number, data in enumerate(rendered(config), 1):
        token.raise_if_cancelled()
        sent = s3.upload_part(**where, UploadId=upload_id, PartNumber=number, Body=data)
        parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        context.log.info("part %d of %d", number, config.parts)
    with token.shield():  # a safe point: either all of it is there, or none
        s3.complete_multipart_upload(**where, UploadId=upload_id, MultipartUpload={"Parts": parts})


@dg.job(executor_def=dg.in_process_executor)
def upload_report() -> None:
    """One upload."""
    upload()


defs = dg.Definitions(jobs=[upload_report])
