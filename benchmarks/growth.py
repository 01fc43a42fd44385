"""Time and memory from a thousand to a million short texts, each size in a process of its own.

    python benchmarks/growth.py                                  # echo-mini, classical, four sizes
    python benchmarks/growth.py --sizes 1000 10000 --mode echo

Texts are numbered, so that none repeats, and are streamed through `encode_iter`, whose vectors are summed and dropped:
what grows would be the encoder's own. Memory is the process's peak less what it was after the first 100 texts. The
model waits while nothing is queued for its thread, because texts are still being tokenised.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

from common import machine


def peak() -> int:
    """Bytes that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(size: int, mode: str) -> dict[str, float]:
    """Embed so many texts in this process."""
    from echo_integrations import Encoder, forward

    busy, forward_one = 0.0, forward._forward

    def timed(*args: Any) -> Any:
        nonlocal busy
        start = time.perf_counter()
        done = forward_one(*args)
        busy += time.perf_counter() - start
        return done

    vars(forward)["_forward"] = timed
    encoder = Encoder(mode=mode, show_progress=False)
    for _ in encoder.encode_iter(f"valve {i} of pump {i * 7919 % 1000}" for i in range(100)):
        pass
    before, start, total, busy = peak(), time.perf_counter(), 0.0, 0.0
    for vectors in encoder.encode_iter(f"valve {i} of pump {i * 7919 % 1000}" for i in range(size)):
        total += float(vectors.sum())
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": peak() - before, "waits": 1 - busy / seconds, "sum": total}


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--mode", default="classical")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(one(args.one, args.mode)))
        return
    print(f"{machine()}\n\n| texts | s | us a text | MB more | the model waits |\n|---|---|---|---|---|", flush=True)
    for size in args.sizes:
        command = [sys.executable, __file__, "--one", str(size), "--mode", args.mode]
        done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        a_text, memory = done["seconds"] / size * 1e6, done["memory"] / 1e6
        print(f"| {size} | {done['seconds']:.1f} | {a_text:.0f} | {memory:.0f} | {done['waits']:.1%} |", flush=True)


if __name__ == "__main__":
    main()
