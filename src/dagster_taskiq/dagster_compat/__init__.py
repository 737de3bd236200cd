"""Dagster's private parts: the only room that imports `dagster._*`, so that the day they move, one place changes.

`tests/unit/dagster_compat` says when they do.
"""
