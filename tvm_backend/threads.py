"""How many threads a library computes with, and that idle ones soon leave the processor to others.

TVM's pool gives each thread a processor of its own and has those that wait ask for work over and over.  On a machine that
is busy with something else both hold a call up: a thread waits for its processor while another one is free, and one that
has spent its share of time by waiting is put last when there is work.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

from cat_plugin.errors import LibraryError

__all__ = ["be_considerate", "bounded", "default", "use"]

_pool = threading.local()

_BIG = 1
"""The pool's mode in which the processors are those that are named."""


_SPIN_COUNT = 2000
"""Looks for work before a thread falls asleep: some microseconds, as the next layer is that far away.

ResNet-20, batch 1, two threads, median ms idle and beside a busy program: 0 looks 0.28 and 0.33; 2000 looks 0.10 and 0.19;
300000, TVM's own, 0.10 and 0.19, but 10 to 24 in the slowest tenth beside the busy program, where 2000 has 0.21.
"""


def be_considerate() -> None:
    """Have threads bound to no processor, and fall asleep soon while they wait; what the environment says stays.

    Read by TVM when it starts its first threads.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(_SPIN_COUNT))


def _processors() -> list[int]:
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


def bounded(threads: int | None) -> int | None:
    """The number of threads to ask for, no more than there are processors for this process.

    Parameters
    ----------
    threads : int or None
        What the caller asks for; None for what ``TVM_NUM_THREADS`` says.

    Returns
    -------
    int or None
        None to leave the number to TVM.

    Raises
    ------
    LibraryError
        It is no number from 1 on.
    """
    if threads is None:
        said = os.environ.get("TVM_NUM_THREADS", "")
        if not said.isdigit() or int(said) < 1:
            return None
        threads = int(said)
    elif type(threads) is not int or threads < 1:
        raise LibraryError(f"threads={threads!r}; give a whole number from 1 on")
    return min(threads, len(_processors()))


@functools.cache
def default(tvm: Any) -> int:
    """Threads that TVM takes by itself; asked for before :func:`use` has changed anything."""
    found: list[int] = []
    # Asking makes the asking thread a pool, which has then as many threads as it will ever have.
    asking = threading.Thread(target=lambda: found.append(int(tvm.get_global_func("runtime.NumThreads")())))
    asking.start()
    asking.join()
    return max([1, *found])


def use(tvm: Any, threads: int, most: int) -> None:
    """Set the number of threads of the pool that belongs to the calling thread, where it is another one.

    Parameters
    ----------
    tvm : module
        TVM.
    threads : int
        For the calls that follow.
    most : int
        That the pool has, where this makes it.
    """
    if getattr(_pool, "threads", None) != threads:
        cpus = [str(cpu) for cpu in _processors()[:threads]]
        tvm.get_global_func("runtime.config_threadpool")(_BIG, threads, cpus, most)
        _pool.threads = threads
