"""Serve a compiled classifier over HTTP: requests that come together are run as one batch.

``python -m examples.serving.server model.so [--port 8000] [--threads 1] [--batch 32] [--wait-ms 2] [--queue 256]``

``POST /predict`` takes one sample: an image file (``image/png``, ``image/jpeg``), prepared as the model was calibrated, or the
input itself as raw little-endian numbers (``application/octet-stream``).  The answer is JSON: ``classes``, ``probabilities`` and
``names`` of the likeliest classes.  ``GET /health`` says whether it works and how much it does.

What is wrong with a request is its 4xx: 400 (not an image, wrong size), 413 (too large), 415 (another content type).  A full queue is 503
with Retry-After, so that a wave of requests costs no memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

import tvm_backend
from cat_plugin.errors import CATError

__all__ = ["Batcher", "QueueFull", "application", "main"]

TOP = 5
LARGEST = 8 << 20  # bytes of a request
PIXELS = 1 << 24  # of an image, before it is decoded: a small file may hold a large one
IMAGES = ("image/png", "image/jpeg")
RAW = "application/octet-stream"
PAGE = 4096


class QueueFull(Exception):
    """More requests are waiting than are admitted."""


class Batcher:
    """Runs what comes together in one call of the library.

    Parameters
    ----------
    library : tvm_backend.Library
        Called in one thread, with the event loop going on meanwhile.
    most : int
        Samples in a call at most.
    wait : float
        Seconds that the first sample waits for others.
    waiting : int
        Samples in the queue at most.
    """

    def __init__(self, library: tvm_backend.Library, most: int, wait: float, waiting: int) -> None:
        self.library, self.most, self.wait = library, most, wait
        self.queue: asyncio.Queue[tuple[NDArray[Any], asyncio.Future[NDArray[Any]]]] = asyncio.Queue(waiting)
        self.batches = self.samples = self.failures = 0
        self._thread = ThreadPoolExecutor(1)

    async def submit(self, sample: NDArray[Any]) -> NDArray[Any]:
        """The library's output for one sample (without the batch axis)."""
        answer: asyncio.Future[NDArray[Any]] = asyncio.get_running_loop().create_future()
        try:
            self.queue.put_nowait((sample, answer))
        except asyncio.QueueFull:
            raise QueueFull from None
        return await answer

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            until = loop.time() + self.wait
            while len(batch) < self.most:
                if not self.queue.empty():
                    batch.append(self.queue.get_nowait())
                    continue
                try:
                    batch.append(await asyncio.wait_for(self.queue.get(), until - loop.time()))
                except TimeoutError:
                    break
            # Who has gone away meanwhile needs no answer.
            batch = [(sample, answer) for sample, answer in batch if not answer.done()]
            if batch:
                await self._answer(loop, batch)

    async def _answer(
        self, loop: asyncio.AbstractEventLoop, batch: list[tuple[NDArray[Any], asyncio.Future[NDArray[Any]]]]
    ) -> None:
        inputs = np.stack([sample for sample, _ in batch])
        self.batches, self.samples = self.batches + 1, self.samples + len(batch)
        try:
            outputs = await loop.run_in_executor(self._thread, self.library, inputs)
        except Exception as error:  # whatever it is, it is the answer, and the server goes on
            self.failures += 1
            outputs = [error] * len(batch)
        for (_, answer), output in zip(batch, outputs, strict=True):
            if answer.done():
                continue
            if isinstance(output, Exception):
                answer.set_exception(output)
            else:
                answer.set_result(output)


def _error(kind: type[web.HTTPException], message: str, **headers: str) -> web.HTTPException:
    return kind(text=message + "\n", headers=headers)


class Requests:
    """From requests to samples, and from logits to answers.

    Parameters
    ----------
    library : tvm_backend.Library
        A classifier of one input.
    """

    def __init__(self, library: tvm_backend.Library) -> None:
        (entry,) = library.manifest["inputs"]
        self.shape = tuple(int(extent) for extent in entry["shape"][1:])
        self.dtype = np.dtype(entry["dtype"]).newbyteorder("<")
        self.preparation = library.preparation
        self.names = library.class_names

    def sample(self, kind: str, body: bytes) -> NDArray[Any]:
        """One sample without its batch axis; what cannot be one is a 4xx."""
        if kind == RAW:
            return self._raw(body)
        if kind in IMAGES and self.preparation is not None and self.preparation.source == "images":
            return self._image(body)
        takes = ", ".join(IMAGES) + ", " if self.preparation is not None else ""
        raise _error(web.HTTPUnsupportedMediaType, f"the content type is {kind}; expected {takes}{RAW}")

    def _raw(self, body: bytes) -> NDArray[Any]:
        expected = int(np.prod(self.shape)) * self.dtype.itemsize
        if len(body) != expected:
            raise _error(
                web.HTTPBadRequest,
                f"the body has {len(body)} bytes; expected {expected}: {self.dtype.name} of shape {self.shape}",
            )
        sample = np.frombuffer(body, self.dtype).reshape(self.shape)
        if sample.dtype.kind == "f" and not np.isfinite(sample).all():
            raise _error(web.HTTPBadRequest, "the input holds NaN or infinite values")
        return sample

    def _image(self, body: bytes) -> NDArray[Any]:
        from PIL import Image

        assert self.preparation is not None
        try:
            with Image.open(io.BytesIO(body), formats=("PNG", "JPEG")) as opened:
                if opened.width * opened.height > PIXELS:
                    raise _error(web.HTTPBadRequest, f"the image has more than {PIXELS} pixels")
                image = opened.convert("L" if self.shape[0] == 1 else "RGB")
        except web.HTTPException:
            raise
        except Exception as error:  # a decoder may raise anything on damaged files
            raise _error(
                web.HTTPBadRequest, f"the body is no PNG or JPEG that can be read: {error}"
            ) from error
        size = self.preparation.image_size
        if size is not None:
            from cat_plugin.graph.preparation import square

            image = square(image, size)
        pixels = np.asarray(image).reshape(1, image.height, image.width, -1)
        try:
            prepared = self.preparation.apply(pixels)[0]
        except CATError as error:
            raise _error(web.HTTPBadRequest, str(error)) from error
        if prepared.shape != self.shape:
            raise _error(
                web.HTTPBadRequest,
                f"the image is {image.width} x {image.height}; expected {self.shape[2]} x {self.shape[1]}",
            )
        return prepared

    def answer(self, logits: NDArray[Any]) -> dict[str, Any]:
        """The likeliest classes."""
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-logits)[:TOP].tolist()
        found: dict[str, Any] = {"classes": best, "probabilities": [float(shares[index]) for index in best]}
        if self.names is not None:
            found["names"] = [self.names[index] for index in best]
        return found


def _resident() -> int:
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def application(
    library: tvm_backend.Library, most: int = 32, wait: float = 0.002, waiting: int = 256
) -> web.Application:
    """The server for one library.

    Parameters
    ----------
    library : tvm_backend.Library
        A classifier: (N, ...) in, logits (N, C) out.
    most, wait, waiting : int, float, int
        As in :class:`Batcher`.
    """
    batcher, requests = Batcher(library, most, wait, waiting), Requests(library)
    worker: list[asyncio.Task[None]] = []
    started = time.monotonic()

    async def predict(request: web.Request) -> web.Response:
        body = await request.read()  # too large is a 413
        sample = requests.sample(request.content_type, body)
        try:
            logits = await batcher.submit(sample)
        except QueueFull:
            raise _error(
                web.HTTPServiceUnavailable, f"{waiting} requests are waiting already", **{"Retry-After": "1"}
            ) from None
        return web.json_response(requests.answer(logits))

    async def health(_: web.Request) -> web.Response:
        well = bool(worker) and not worker[0].done()
        state = {
            "status": "ok" if well else "not working",
            "seconds": round(time.monotonic() - started, 1),
            "samples": batcher.samples,
            "batches": batcher.batches,
            "failures": batcher.failures,
            "waiting": batcher.queue.qsize(),
            "resident_bytes": _resident(),
        }
        return web.json_response(state, status=200 if well else 503)

    async def work(_: web.Application) -> AsyncIterator[None]:
        await asyncio.to_thread(
            library, np.zeros((1, *requests.shape), requests.dtype)
        )  # the first call is slow
        worker.append(asyncio.create_task(batcher.run()))
        yield
        worker[0].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker[0]

    served = web.Application(client_max_size=LARGEST)
    served.add_routes([web.post("/predict", predict), web.get("/health", health)])
    served.cleanup_ctx.append(work)
    return served


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "library", type=Path, help="what 'cat-ptq compile' wrote, of a bundle of a classifier"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="of a call of the library")
    parser.add_argument("--batch", type=int, default=32, help="samples in a call at most")
    parser.add_argument(
        "--wait-ms", type=float, default=2.0, help="how long the first of them waits for others"
    )
    parser.add_argument(
        "--queue", type=int, default=256, help="samples that wait at most; beyond, the answer is 503"
    )
    options = parser.parse_args()
    library = tvm_backend.load(options.library, options.threads)
    served = application(library, options.batch, options.wait_ms / 1000, options.queue)
    web.run_app(served, host=options.host, port=options.port)


if __name__ == "__main__":
    main()
