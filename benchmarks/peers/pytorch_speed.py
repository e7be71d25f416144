"""Speed of PyTorch on this CPU: eager and compiled (inductor), in float32 and bfloat16, channels last where faster.

Run in an environment that holds torch, from the checkout; compiled rows need a C++ compiler::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.pytorch_speed --out pytorch.json
"""

from __future__ import annotations

import os

import torch

from benchmarks.models import MODELS
from benchmarks.peers.common import Rows, images_of, median_ms, relative_error, speed_parser

PRECISIONS = ("eager fp32", "eager bf16", "compiled fp32", "compiled bf16")


def main() -> None:
    """Measure what the command line asks for."""
    options = speed_parser(__doc__, PRECISIONS).parse_args()
    torch.set_num_threads(options.threads)
    if options.kept is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.kept / "inductor"))
    rows = Rows(options.out, "torch")
    for name in options.models:
        for batch in options.batches:
            x = images_of(name, options.data, batch)
            with torch.inference_mode():
                expected = MODELS[name](options.data)(x)
            for precision in options.precisions:
                with rows.row(model=name, batch=batch, precision=precision, threads=options.threads) as row:
                    how, kind = precision.split()
                    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
                    best: dict[str, object] | None = None
                    for layout in (torch.contiguous_format, torch.channels_last):
                        model = MODELS[name](options.data).to(dtype=dtype, memory_format=layout)
                        given = x.to(dtype=dtype, memory_format=layout)
                        if how == "compiled":
                            torch._dynamo.reset()
                            model = torch.compile(model)
                        with torch.inference_mode():
                            result = model(given)
                            times = median_ms(
                                lambda model=model, given=given: model(given), options.seconds / 2
                            )
                        times["layout"] = str(layout).removeprefix("torch.")
                        times["error"] = relative_error(result.float(), expected)
                        if best is None or times["ms"] < best["ms"]:
                            best = times
                    row.update(best or {})


if __name__ == "__main__":
    main()
