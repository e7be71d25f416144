"""A bounded load test of the server: so many requests a second for so long, and what became of them.

``python -m examples.serving.load http://127.0.0.1:8000 --shape 3,32,32 [--rate 500] [--seconds 10]`` prints JSON: requests answered
and refused, the rate that was reached, latencies, and the server's memory before and after.  Requests are sent when they are due, whether
earlier ones were answered or not, and latencies count from then: a server that stalls is not spared the requests that would have come.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from typing import Any

import aiohttp
import numpy as np

__all__ = ["load"]

HEADERS = {"Content-Type": "application/octet-stream"}


async def load(
    url: str, shape: tuple[int, ...], rate: float, seconds: float, at_once: int = 512
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

    Returns
    -------
    dict
        ``sent``, ``statuses``, ``rate`` of those answered with 200, ``p50_ms``, ``p99_ms``, ``resident_bytes`` before and after.
    """
    body = np.random.default_rng(0).standard_normal(shape).astype("<f4").tobytes()
    times: list[float] = []
    statuses: Counter[str] = Counter()
    connector = aiohttp.TCPConnector(limit=at_once)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def resident() -> int:
            async with session.get(f"{url}/health") as response:
                found: int = (await response.json())["resident_bytes"]
                return found

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
        before = await resident()
        started = time.monotonic()
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
        after = await resident()
    p50, p99 = np.percentile(np.array(times or [np.nan]) * 1e3, [50, 99]).round(2).tolist()
    return {
        "sent": sum(count for status, count in statuses.items() if status != "not_sent"),
        "statuses": dict(statuses),
        "rate": round(len(times) / spent, 1),
        "p50_ms": p50,
        "p99_ms": p99,
        "resident_bytes": [before, after],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--shape", required=True, help="of one input, as 3,32,32")
    parser.add_argument("--rate", type=float, default=500.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    shape = tuple(int(part) for part in options.shape.split(","))
    print(json.dumps(asyncio.run(load(options.url, shape, options.rate, options.seconds)), indent=2))


if __name__ == "__main__":
    main()
