"""An instruction before short queries, computed once against with every query, interleaved in one run.

    python benchmarks/shared_prefix.py                  # a Qwen3-0.6B-shaped random model
    python benchmarks/shared_prefix.py --shape mini     # echo-mini

Queries of 12 random tokens behind an instruction of 40; and, for what it does where little is shared, passages of 200
behind the same instruction. The vectors of both sides are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import ASSETS, build_qwen3_600m, machine, ratio, take_turns
from numpy.typing import NDArray

from echo_integrations import Encoder
from echo_integrations.backbone import Backbone, BackboneSpec
from echo_integrations.forward import Row, embed
from echo_integrations.recipe import Rendered
from echo_integrations.registry import registry
from echo_integrations.resolve import resolve


def rows(instruction: int, text: int, count: int, vocabulary: int) -> list[Row]:
    """Texts of so many random tokens behind the same random tokens; the text is pooled."""
    chance = np.random.default_rng(0)
    head = chance.integers(10, vocabulary, instruction)
    texts = chance.integers(10, vocabulary, (count, text))
    spans = ((instruction, instruction + text),)
    return [
        Row(Rendered(np.concatenate([head, ids]).astype(np.int32), spans, text, head=instruction), "") for ids in texts
    ]


def vectors(backbone: Backbone, batch: list[Row], shares: bool) -> NDArray[np.float32]:
    """(n, H) with or without sharing what the rows begin with."""
    backbone.shares_prefixes = shares
    result = np.empty((len(batch), backbone.spec.checkpoint.hidden_size), dtype=np.float32)
    for done in embed(backbone, batch):
        result[done.rows] = done.vectors
    return result


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("mini", "0.6b"), default="0.6b")
    parser.add_argument("--instruction", type=int, default=40)
    parser.add_argument("--queries", type=int, help="how many (default: 1000 for mini, 64 for 0.6b)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model-folder", type=Path, default=Path(tempfile.gettempdir()) / "qwen3-0.6b-shape")
    args = parser.parse_args()
    folder = ASSETS / "echo-mini" if args.shape == "mini" else build_qwen3_600m(args.model_folder)
    encoder = Encoder(model=str(folder), dtype=args.dtype)
    backbone = registry.acquire(BackboneSpec.of(encoder, *resolve(encoder)), encoder)
    vocabulary = min(backbone.model.get_input_embeddings().weight.shape[0], 8_000)
    count = args.queries or (1000 if args.shape == "mini" else 64)
    print(f"{machine()}\n{args.rounds} rounds interleaved, instruction of {args.instruction} tokens\n")
    print("| texts | each with it, s | once, s | times as quick | smallest cosine |\n|---|---|---|---|---|")
    for size, number in ((12, count), (200, max(8, count // 8))):
        batch = rows(args.instruction, size, number, vocabulary)
        sides = {"each": partial(vectors, backbone, batch, False), "once": partial(vectors, backbone, batch, True)}
        seconds = take_turns(sides, args.rounds)
        first, second = (torch.from_numpy(vectors(backbone, batch, shares)) for shares in (True, False))
        cosine = torch.nn.functional.cosine_similarity(first, second).min()
        print(
            f"| {number} of {size} tokens | {statistics.median(seconds['each']):.2f} | "
            f"{statistics.median(seconds['once']):.2f} | {ratio(seconds, 'each', 'once'):.2f} | {cosine:.6f} |"
        )


if __name__ == "__main__":
    main()
