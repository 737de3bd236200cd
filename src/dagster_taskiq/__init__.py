"""Dagster runs and steps over Taskiq on AWS SQS, with a cancellation that always works."""

from dagster_taskiq.version import __version__ as __version__
