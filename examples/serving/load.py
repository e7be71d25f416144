"""A bounded load test of the server: so many requests a second for so long, and what became of them.

``python -m examples.serving.load http://127.0.0.1:8000 --shape 3,32,32 [--rate 500] [--seconds 10]`` prints JSON: requests answered
and refused, the rate that was reached, latencies, and the server's memory over time.  Requests are sent when they are due, whether
earlier ones were answered or not, and latencies count from then: a server that stalls is not spared the requests that would have come.
``--serve model.so`` in the place of the address starts a server on a free port of this machine, and stops it afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

__all__ = ["input_shape", "load", "serving"]

HEADERS = {"Content-Type": "application/octet-stream"}
START = 60.0  # seconds that a server may take until it answers


async def load(
    url: str,
    shape: tuple[int, ...],
    rate: float,
    seconds: float,
    at_once: int = 512,
    every: float = 10.0,
) -> dict[str, Any]:
    """Send requests at a rate.

    Parameters
    ----------
    url : str
        Of the server.
    shape : tuple of int
        Of one input, float32.
    rate, seconds : float
        Requests a second, and for how long.
    at_once : int
        Requests open at a time at most; what would be more is counted as ``not_sent``.
    every : float
        Seconds between two looks at the server's memory.

    Returns
    -------
    dict
        ``sent``, ``statuses``, ``rate`` of those answered with 200, ``p50_ms``, ``p99_ms``, ``most_ms``, and ``resident``: pairs of
        seconds and bytes, before, during and after.
    """
    body = np.random.default_rng(0).standard_normal(shape).astype("<f4").tobytes()
    times: list[float] = []
    statuses: Counter[str] = Counter()
    resident: list[tuple[float, int]] = []
    connector = aiohttp.TCPConnector(limit=at_once)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def look(started: float) -> None:
            async with session.get(f"{url}/health") as response:
                found: int = (await response.json())["resident_bytes"]
                resident.append((round(time.monotonic() - started, 1), found))

        async def keep_looking(started: float) -> None:
            while True:
                await asyncio.sleep(every)
                with contextlib.suppress(
                    aiohttp.ClientError
                ):  # a request that fails is counted where it is one
                    await look(started)

        async def one(due: float) -> None:
            try:
                async with session.post(f"{url}/predict", data=body, headers=HEADERS) as response:
                    await response.read()
                    statuses[str(response.status)] += 1
                    if response.status == 200:
                        times.append(time.monotonic() - due)
            except aiohttp.ClientError as error:
                statuses[type(error).__name__] += 1

        for _ in range(8):  # connections, and the library's first calls of a size
            await one(time.monotonic())
        times.clear()
        statuses.clear()
        started = time.monotonic()
        await look(started)
        looking = asyncio.create_task(keep_looking(started))
        open_ones: set[asyncio.Task[None]] = set()
        for number in range(round(rate * seconds)):
            due = started + number / rate
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            if len(open_ones) >= at_once:
                await asyncio.sleep(0)
                statuses["not_sent"] += 1
                continue
            task = asyncio.create_task(one(due))
            open_ones.add(task)
            task.add_done_callback(open_ones.discard)
        await asyncio.gather(*open_ones)
        spent = time.monotonic() - started
        looking.cancel()
        await look(started)
    p50, p99, most = np.percentile(np.array(times or [np.nan]) * 1e3, [50, 99, 100]).round(2).tolist()
    return {
        "sent": sum(count for status, count in statuses.items() if status != "not_sent"),
        "statuses": dict(statuses),
        "rate": round(len(times) / spent, 1),
        "p50_ms": p50,
        "p99_ms": p99,
        "most_ms": most,
        "resident": resident,
    }


def input_shape(library: Path) -> tuple[int, ...]:
    """Shape of one input of a compiled library, as its description says."""
    (entry,) = json.loads(library.with_suffix(".json").read_text())["inputs"]
    return tuple(entry["shape"][1:])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


@contextlib.contextmanager
def serving(library: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """A server in a process of its own while the block runs.

    Parameters
    ----------
    library : path
        A compiled library of a classifier.
    options : sequence of str
        Of the server, such as ``["--threads", "2"]``.

    Yields
    ------
    str
        Its address.

    Raises
    ------
    RuntimeError
        It ends, or does not answer within a minute.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "examples.serving.server", str(library), "--port", str(port), *options]
    server, url = subprocess.Popen(command, stdout=subprocess.DEVNULL), f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server does not answer: {' '.join(command)}")
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("url", nargs="?", help="of a server that runs")
    which.add_argument("--serve", type=Path, metavar="LIBRARY", help="start one on this library")
    parser.add_argument("--shape", help="of one input, as 3,32,32 (default: as the library says)")
    parser.add_argument("--rate", type=float, default=500.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    if options.shape is None and options.serve is None:
        parser.error("give --shape, such as 3,32,32")
    shape = tuple(map(int, options.shape.split(","))) if options.shape else input_shape(options.serve)
    with serving(options.serve) if options.serve else contextlib.nullcontext(options.url) as url:
        print(json.dumps(asyncio.run(load(url, shape, options.rate, options.seconds)), indent=2))


if __name__ == "__main__":
    main()
