"""Makes a function a step of a flow: a Prefect task that behaves as all of them do."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from tasks.orchestration.retries import RETRIED

P = ParamSpec("P")
R = TypeVar("R")


def step(name: str, *, retried: bool = True) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Returns the decorator of a task whose results are neither kept nor reused: Prefect's cache knows neither our code
    nor what the bucket still holds.

    Args:
        retried: whether it can be done again, and so is after an outage.
    """
    options: dict[str, Any] = RETRIED if retried else {}
    return task(name=name, cache_policy=NO_CACHE, persist_result=False, **options)
