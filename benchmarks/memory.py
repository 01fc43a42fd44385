"""Memory that `Encoder.encode` takes beyond its result, on 200 000 short texts.

    python benchmarks/memory.py

Peak resident memory during the call, less what was resident after loading and warming up, less the result array.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from pathlib import Path

from common import machine

from echo_integrations import Encoder

WORDS = "pump valve pressure filter tank lamp garden winter cable water seal gauge relay".split()


def resident() -> float:
    """Resident memory now, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak() -> float:
    """Largest resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1e-6 if sys.platform == "darwin" else 1.024e-3)


def main() -> None:
    """Run the benchmark and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=200_000)
    parser.add_argument("--mode", default="classical")
    parser.add_argument("--model", default="echo-mini")
    args = parser.parse_args()
    choose = random.Random(0)
    texts = [f"{' '.join(choose.choices(WORDS, k=choose.randint(3, 12)))} {i}" for i in range(args.texts)]
    encoder = Encoder(model=args.model, mode=args.mode, dtype="float32", show_progress=True)
    encoder.encode(texts[:2000])
    before = resident()
    start = time.perf_counter()
    vectors = encoder.encode(texts)
    seconds = time.perf_counter() - start
    result = vectors.nbytes / 1e6
    print(machine())
    print(f"{len(texts)} texts in {seconds:.0f} s ({len(texts) / seconds:.0f} texts/s)")
    print(f"result {result:.0f} MB, peak beyond it {peak() - before - result:.0f} MB; {before:.0f} MB before the call")


if __name__ == "__main__":
    main()
