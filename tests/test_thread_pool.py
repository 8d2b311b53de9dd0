"""Pools of threads where the system lets this process have no more of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from swarmcache.errors import NoThread
from swarmcache.thread_pool import ThreadPool

DEADLINE_S = 10.0


@contextmanager
def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as scarce:
        scarce.setattr(threading.Thread, "start", refuse)
        yield


def test_calls_wait_for_the_threads_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    with ThreadPool(2) as pool:
        first = pool.submit(go_on.wait, DEADLINE_S)
        with no_more_threads(monkeypatch):
            second = pool.submit(threading.get_ident)
        go_on.set()
        assert first.result(DEADLINE_S)
        assert second.result(DEADLINE_S) == pool.submit(threading.get_ident).result(DEADLINE_S)


def test_without_any_thread_a_call_is_refused_and_never_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    with ThreadPool(2) as pool:
        with no_more_threads(monkeypatch):
            for _ in range(2):
                with pytest.raises(NoThread, match="can't start new thread"):
                    pool.submit(made.append, "refused")
        pool.submit(made.append, "afterwards").result(DEADLINE_S)
    assert made == ["afterwards"]
