"""The server in examples/serving: batches, limits, what is wrong with a request, and a second of load."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("aiohttp", reason="aiohttp is not installed")

from aiohttp.test_utils import TestClient, TestServer

from cat_plugin.graph.preparation import Preparation
from examples.serving import server
from examples.serving.load import load
from examples.serving.load import main as load_main

RAW = {"Content-Type": "application/octet-stream"}
SHAPE = (3, 4, 4)


class FakeLibrary:
    """Logits that say what came in: class 1 where the mean is positive."""

    def __init__(self, preparation: Preparation | None = None) -> None:
        self.manifest = {"inputs": [{"name": "x", "dtype": "float32", "shape": ["N", *SHAPE]}]}
        self.preparation, self.class_names = preparation, ["below", "above"]
        self.calls: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, inputs: NDArray[Any]) -> NDArray[Any]:
        self.go_on.wait(60)
        self.calls.append(len(inputs))
        if (inputs == 13).all(-1).any():
            raise RuntimeError("unlucky")
        means = inputs.mean((1, 2, 3))
        return np.stack([-means, means], 1)


def serve(library: Any, talk: Callable[[Any], Awaitable[None]], **limits: Any) -> None:
    """Run the server in this process while a client talks to it."""

    async def both() -> None:
        async with TestClient(TestServer(server.application(library, **limits))) as client:
            await talk(client)

    asyncio.run(both())


def raw(value: float) -> bytes:
    return np.full(SHAPE, value, "<f4").tobytes()


def png(value: int, size: int = 4) -> bytes:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    stream = io.BytesIO()
    image.fromarray(np.full((size, size, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_what_comes_together_is_one_batch_and_everybody_gets_their_own_answer() -> None:
    library = FakeLibrary()

    async def talk(client: Any) -> None:
        library.go_on.clear()
        signs = [1, -1, -1, 1, 1]
        asked = [asyncio.create_task(client.post("/predict", data=raw(sign), headers=RAW)) for sign in signs]
        await asyncio.sleep(0.05)
        library.go_on.set()
        for sign, response in zip(signs, await asyncio.gather(*asked), strict=True):
            assert response.status == 200
            answer = await response.json()
            assert answer["names"][0] == ("above" if sign > 0 else "below")
            assert answer["classes"][0] == int(sign > 0)
            assert answer["probabilities"][0] == pytest.approx(1 / (1 + np.exp(-2)))
        health = await (await client.get("/health")).json()
        assert health["status"] == "ok"
        assert health["samples"] == 5
        assert health["resident_bytes"] > 1e6

    serve(library, talk, most=4, wait=5.0)
    assert library.calls[1:] == [4, 1]  # behind the first call, which warms up; 4 is the most


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (raw(1)[:-1], "application/octet-stream", 400, "191 bytes; expected 192: float32 of shape (3, 4, 4)"),
        (raw(float("nan")), "application/octet-stream", 400, "NaN"),
        (b"{}", "application/json", 415, "application/json; expected image/png"),
        (b"no image", "image/png", 400, "no PNG or JPEG"),
        (png(9, size=5), "image/png", 400, "5 x 5; expected 4 x 4"),
        (bytes(server.LARGEST + 1), "application/octet-stream", 413, ""),
        (raw(13), "application/octet-stream", 500, ""),
    ],
)
def test_what_is_wrong_with_a_request_is_said_and_the_server_goes_on(
    body: bytes, kind: str, status: int, message: str
) -> None:
    async def talk(client: Any) -> None:
        response = await client.post("/predict", data=body, headers={"Content-Type": kind})
        assert response.status == status
        assert message in await response.text()
        assert (
            await client.post("/predict", data=png(200), headers={"Content-Type": "image/png"})
        ).status == 200
        assert (await client.get("/health")).status == 200

    serve(FakeLibrary(Preparation()), talk)


def test_a_large_image_in_a_small_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PIXELS", 15)

    async def talk(client: Any) -> None:
        response = await client.post("/predict", data=png(1), headers={"Content-Type": "image/png"})
        assert response.status == 400
        assert "more than 15 pixels" in await response.text()

    serve(FakeLibrary(Preparation()), talk)


def test_images_are_for_models_that_were_calibrated_on_images() -> None:
    async def talk(client: Any) -> None:
        response = await client.post("/predict", data=png(1), headers={"Content-Type": "image/png"})
        assert response.status == 415

    serve(FakeLibrary(), talk)


def test_a_full_queue_is_said_at_once() -> None:
    library = FakeLibrary()

    async def talk(client: Any) -> None:
        library.go_on.clear()
        asked = []
        for _ in range(6):  # one at work, two waiting
            asked.append(asyncio.create_task(client.post("/predict", data=raw(1), headers=RAW)))
            await asyncio.sleep(0.02)
        refused = [task for task in asked if task.done()]
        assert len(refused) == 3
        library.go_on.set()
        responses = await asyncio.gather(*asked)
        assert sorted(response.status for response in responses) == [200] * 3 + [503] * 3
        assert all(task.result().headers["Retry-After"] for task in refused)

    serve(library, talk, most=1, waiting=2)


def test_health_says_when_nothing_works() -> None:
    async def talk(client: Any) -> None:
        for task in asyncio.all_tasks():
            if "Batcher.run" in str(task.get_coro()):
                task.cancel()
        await asyncio.sleep(0.01)
        assert (await client.get("/health")).status == 503

    serve(FakeLibrary(), talk)


def test_a_second_of_load(digits_library: Any, digits_split: Any) -> None:
    """A real library answers all that comes, with what it gives when it is asked directly."""
    import tvm_backend

    images = digits_split.test[0].numpy()
    library = tvm_backend.load(digits_library, 1)
    expected = library(images[:20]).argmax(1).tolist()

    async def talk(client: Any) -> None:
        answers = [
            await (await client.post("/predict", data=image.astype("<f4").tobytes(), headers=RAW)).json()
            for image in images[:20]
        ]
        assert [answer["classes"][0] for answer in answers] == expected
        url = str(client.make_url("")).rstrip("/")
        found = await load(url, images.shape[1:], rate=50, seconds=1, every=0.2)
        assert found["sent"] == found["statuses"]["200"] == 50
        assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["most_ms"]
        seconds, sizes = zip(*found["resident"], strict=True)
        assert len(seconds) >= 3  # before, during and after
        assert list(seconds) == sorted(seconds)
        assert min(sizes) > 1e6

    serve(library, talk)


def test_the_program_says_what_it_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to the server, which is only looked at."""
    seen = SimpleNamespace()
    monkeypatch.setattr(server.tvm_backend, "load", lambda path, threads: FakeLibrary())
    monkeypatch.setattr(server.web, "run_app", lambda made, **where: seen.__dict__.update(where, made=made))
    monkeypatch.setattr("sys.argv", ["server", "model.so", "--port", "8123"])
    server.main()
    assert (seen.host, seen.port) == ("127.0.0.1", 8123)
    assert {str(route.resource.canonical) for route in seen.made.router.routes()} == {"/predict", "/health"}


def test_the_load_test_brings_up_a_server_and_takes_it_down(
    digits_library: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both from the command line, each in a process of its own."""
    monkeypatch.setattr(
        "sys.argv", ["load", "--serve", str(digits_library), "--rate", "20", "--seconds", "1"]
    )
    load_main()
    found = json.loads(capsys.readouterr().out)
    assert found["statuses"] == {"200": 20}


def test_the_load_test_wants_a_shape_or_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["load", "http://127.0.0.1:1"])
    with pytest.raises(SystemExit):
        load_main()
