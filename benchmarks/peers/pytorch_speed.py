"""Speed of PyTorch on this CPU: eager and compiled (inductor), in float32 and bfloat16, channels last where faster.

Run in an environment that holds torch, from the checkout; compiled rows need a C++ compiler::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.pytorch_speed --out pytorch.json

``compiled w8a8`` and the like are the programs of our own bundles, corrected as they are, which ``benchmarks.inference --only
prepare`` made: ``--kept`` then names the folder ``models`` of its cache.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.inference_ours import prepared
from benchmarks.models import MODELS
from benchmarks.peers.common import Rows, images_of, median_ms, relative_error, speed_parser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUNDLES = ("compiled w8a8", "compiled w4a4", "compiled w2a2")
PRECISIONS = ("eager fp32", "eager bf16", "compiled fp32", "compiled bf16", *BUNDLES)


def _model(name: str, kind: str, data: str | None, kept: Path | None) -> Any:
    """The network itself for ``fp32`` and ``bf16``, else the program of the bundle of that precision."""
    if kind in DTYPES:
        return MODELS[name](data).to(DTYPES[kind])
    from cat_plugin.graph.bundle import read_bundle

    if kept is None:
        raise ValueError(
            "rows of bundles need --kept, the folder `models` in the cache of benchmarks.inference"
        )
    return read_bundle(prepared(name, kind, kept.parent).with_suffix(".bundle")).program().module()


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
                    images = x.ndim == 4
                    dtype = DTYPES.get(kind, torch.float32) if images else x.dtype
                    best: dict[str, object] | None = None
                    for layout in (torch.contiguous_format, *((torch.channels_last,) if images else ())):
                        model = _model(name, kind, options.data, options.kept).to(memory_format=layout)
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
