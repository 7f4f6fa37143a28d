"""Defines the steps of flows: Prefect tasks with common options."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from tasks.orchestration.retries import RETRIED

P = ParamSpec("P")
R = TypeVar("R")


def step(name: str, *, retried: bool = True) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Returns a decorator that makes a function a task without stored or cached results.

    Prefect's cache would notice neither changes of Convoy's code nor deletions in the bucket.

    Args:
        retried: whether the task is retried after an outage.
    """
    options: dict[str, Any] = RETRIED if retried else {}
    return task(name=name, cache_policy=NO_CACHE, persist_result=False, **options)
