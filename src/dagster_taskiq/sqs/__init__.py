"""AWS in our words: SQS queues, leases, payloads in S3. The only room that knows botocore; knows no taskiq."""
