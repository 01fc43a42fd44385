"""Many callers at once: throughput against a loop, latency under load, and what a lone caller pays.

    python benchmarks/callers.py --data FOLDER                  # a Qwen3-0.6B-shaped random model
    python benchmarks/callers.py --data FOLDER --shape mini     # echo-mini

64 single questions: asked one after the other, from 64 threads, and from 64 tasks of an event loop. Latency: questions
arrive at random (a Poisson process) at half the rate that 64 at once were answered at. A lone caller: the same question
through the encoder and through the model's thread-less inside, by turns; the difference of the medians is what the
thread costs.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import ASSETS, build_qwen3_600m, machine, ratio, take_turns, textbook_texts

from echo_integrations import Encoder
from echo_integrations.backbone import BackboneSpec
from echo_integrations.config import Role
from echo_integrations.forward import Row, embed
from echo_integrations.registry import registry
from echo_integrations.resolve import recipe_of, resolve


async def at_once(encoder: Encoder, questions: list[str]) -> list[Any]:
    """Every question a task."""
    return await asyncio.gather(*(encoder.aencode_query(question) for question in questions))


async def arriving(encoder: Encoder, questions: list[str], rate: float) -> list[float]:
    """Seconds that each question waits for its answer, when they arrive at random at a rate (a second)."""
    chance = random.Random(0)

    async def ask(question: str) -> float:
        start = time.perf_counter()
        await encoder.aencode_query(question)
        return time.perf_counter() - start

    tasks = []
    for question in questions:
        tasks.append(asyncio.ensure_future(ask(question)))
        await asyncio.sleep(chance.expovariate(rate))
    return await asyncio.gather(*tasks)


def main() -> None:
    """Run the benchmark and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shape", choices=("mini", "0.6b"), default="0.6b")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--arrivals", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model-folder", type=Path, default=Path(tempfile.gettempdir()) / "qwen3-0.6b-shape")
    args = parser.parse_args()
    questions = textbook_texts(args.data, 0, args.callers + args.arrivals)
    asked, later = questions[: args.callers], questions[args.callers :]
    folder = ASSETS / "echo-mini" if args.shape == "mini" else build_qwen3_600m(args.model_folder)
    encoder = Encoder(model=str(folder), mode="classical", dtype=args.dtype, show_progress=False)
    backbone = registry.acquire(BackboneSpec.of(encoder, *resolve(encoder)), encoder)
    recipe = recipe_of(encoder, Role.QUERY, *resolve(encoder))
    words = statistics.mean(row.size for row in recipe.render(asked))
    print(f"{machine()}\n{args.callers} questions of {words:.0f} tokens, {args.rounds} rounds interleaved\n")

    with ThreadPoolExecutor(args.callers) as pool:
        seconds = take_turns(
            {
                "one after the other": lambda: [encoder.encode_query(question) for question in asked],
                "threads": lambda: list(pool.map(encoder.encode_query, asked)),
                "tasks": lambda: asyncio.run(at_once(encoder, asked)),
            },
            args.rounds,
        )
    print("| | median s | times as quick |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times):.3f} | {ratio(seconds, 'one after the other', name):.2f} |")

    through: list[float] = []
    direct: list[float] = []
    for question in asked * 3:
        start = time.perf_counter()
        encoder.encode_query(question)
        through.append(time.perf_counter() - start)
        start = time.perf_counter()
        rows = [Row(rendered, "", None) for rendered in recipe.render([question])]
        np.concatenate([done.vectors for done in embed(backbone, rows)])
        direct.append(time.perf_counter() - start)
    lone = statistics.median(through)
    print(f"\nA lone caller: {lone * 1e3:.2f} ms, of which the way to the model and back takes ", end="")
    print(f"{(lone - statistics.median(direct)) * 1e3:.2f} ms")

    rate = args.callers / statistics.median(seconds["tasks"]) / 2
    waits = sorted(asyncio.run(arriving(encoder, later, rate)))
    middle, last = statistics.median(waits), waits[int(len(waits) * 0.99)]
    print(f"At {rate:.1f} arrivals a second: median {middle * 1e3:.1f} ms, p99 {last * 1e3:.1f} ms, ", end="")
    print(f"{last / lone:.2f} times a lone query")


if __name__ == "__main__":
    main()
