"""Time the encoder against a plain loop, interleaved in one run, on textbook passages and questions.

    python benchmarks/encode.py --data FOLDER                 # echo-mini, 2 000 passages and 2 000 questions
    python benchmarks/encode.py --data FOLDER --shape 0.6b    # a Qwen3-0.6B-shaped random model, 200 texts

FOLDER holds textbooks.jsonl.xz and questions_dev.jsonl. Both sides embed one copy of each text, mean-pooled, without
an LM head. Ratios are medians over the rounds; absolute figures depend on the machine's mood.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import ASSETS, PlainLoop, build_qwen3_600m, count_tokens, machine, textbook_texts

from echo_integrations import Encoder


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shape", choices=("mini", "0.6b"), default="mini")
    parser.add_argument("--texts", type=int, help="how many (default: 4000 for mini, 200 for 0.6b)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "auto"])
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--model-folder", type=Path, default=Path(tempfile.gettempdir()) / "qwen3-0.6b-shape")
    args = parser.parse_args()
    count = args.texts or (4000 if args.shape == "mini" else 200)
    texts = textbook_texts(args.data, count - count // 2, count // 2)
    folder = ASSETS / "echo-mini" if args.shape == "mini" else build_qwen3_600m(args.model_folder)

    settings: dict[str, Any] = {
        "model": str(folder),
        "mode": "classical",
        "show_progress": False,
        "on_truncate": "truncate",
    }
    encoders = {d: Encoder(**settings, dtype=d, token_budget=args.token_budget) for d in args.dtypes}
    loop = PlainLoop(folder)
    sides: dict[str, Callable[[list[str]], Any]] = {"plain loop, float32": loop.encode}
    sides |= {f"encoder, {dtype}": encoder.encode for dtype, encoder in encoders.items()}
    tokens = count_tokens(texts, folder)
    print(f"{machine()}\n{len(texts)} texts, {tokens} tokens, {args.rounds} rounds interleaved, shape {args.shape}\n")

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    vectors = {name: encode(texts[:8]) for name, encode in sides.items()}  # loads and warms up
    for _ in range(args.rounds):
        for name, encode in sides.items():
            start = time.perf_counter()
            vectors[name] = encode(texts)
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)

    plain = "plain loop, float32"
    print("| | texts/s | tokens/s | ratio to the loop | smallest cosine to fp32 |\n|---|---|---|---|---|")
    for name in sides:
        middle = statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[plain], seconds[name], strict=True))
        cosine = np.sum(vectors[plain] * vectors[name], axis=1).min()
        print(f"| {name} | {len(texts) / middle:.1f} | {tokens / middle:.0f} | {ratio:.2f} | {cosine:.6f} |")


if __name__ == "__main__":
    main()
