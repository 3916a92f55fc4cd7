"""Processes of one thread each, for work on models so small that they use one core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import TypeVar

Work = TypeVar("Work")


def in_processes(work: Callable[[Work], None], given: Iterable[Work], processes: int) -> Iterator[Work]:
    """Do all work in so many processes, and yield each piece as it is done; in this process if there is one only.

    Args:
        work: A function of a module, since other processes import it; what it makes, it leaves on disk.
        given: Its arguments, which can be sent to a process.
        processes: How many.
    """
    todo = list(given)
    if processes == 1 or len(todo) < 2:
        for one in todo:
            work(one)
            yield one
        return
    with ProcessPoolExecutor(min(processes, len(todo)), get_context("spawn"), initializer=_start) as pool:
        started = {pool.submit(work, one): one for one in todo}
        try:
            for future in as_completed(started):
                future.result()
                yield started[future]
        except BaseException:
            # What has not begun must not keep a failure waiting.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start() -> None:
    import torch  # late, so that asking for processes costs nothing

    torch.set_num_threads(1)
    leave_with_parent()


def leave_with_parent() -> None:
    """End this process when its parent is gone: what was killed must not run on unseen."""
    Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
