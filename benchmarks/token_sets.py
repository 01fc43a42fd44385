"""Time LLM2Vec-Gen against classical mode, and sixteen token sets in a batch against one, interleaved in one run.

    python benchmarks/token_sets.py --data FOLDER                 # echo-mini, 600 passages and questions
    python benchmarks/token_sets.py --data FOLDER --shape 0.6b    # a Qwen3-0.6B-shaped random model, 32 texts

Classical mode embeds the same texts with as many tokens more as a token set has. The sixteen sets embed every text,
through the interface that mixes them in a batch; one set embeds as many rows, nothing deduplicated. Random token sets
of 10 thought and 10 compression tokens: what they cost does not depend on what they learnt.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ASSETS, build_qwen3_600m, machine, ratio, take_turns, textbook_texts

from echo_integrations import Encoder
from echo_integrations.backbone import BackboneSpec
from echo_integrations.checkpoint import Checkpoint
from echo_integrations.config import Role
from echo_integrations.forward import Row, embed
from echo_integrations.registry import registry
from echo_integrations.resolve import recipe_of, resolve
from echo_integrations.token_set import TokenSet

TOKENS = 20


def random_token_set(model: Path, folder: Path, seed: int, dimension: int = 384) -> Path:
    """A set of 10 thought and 10 compression tokens with random numbers."""
    checkpoint = Checkpoint.find(Encoder(model=str(model)))
    hidden = checkpoint.hidden_size
    torch.manual_seed(seed)
    maps = {
        "reconstruction.weight": torch.randn(hidden, hidden) / hidden**0.5,
        "reconstruction.bias": torch.zeros(hidden),
    }
    maps |= {"alignment.weight": torch.randn(dimension, hidden) / hidden**0.5, "alignment.bias": torch.zeros(dimension)}
    rows = torch.randn(TOKENS, hidden) * 0.02
    identity = checkpoint.identity()
    TokenSet(rows=rows, maps=maps, compression=10, backbone=str(model), backbone_identity=identity).save(folder)
    return folder


def rows_of(encoder: Encoder, texts: list[str]) -> list[Row]:
    """The texts laid out for a token set, as the encoder does it."""
    checkpoint, token_set = resolve(encoder)
    rendered = recipe_of(encoder, Role.DOCUMENT, checkpoint, token_set).render(texts)
    return [Row(r, text, token_set) for r, text in zip(rendered, texts, strict=True)]


def compare(folder: Path, texts: list[str], rounds: int, dtype: str, work: Path) -> None:
    """Time the four sides by turns and print a table."""
    settings: dict[str, Any] = {"model": str(folder), "dtype": dtype, "show_progress": False}
    settings |= {"on_truncate": "truncate", "document_instruction": ""}
    sets = [random_token_set(folder, work / str(seed), seed) for seed in range(16)]
    encoders = [Encoder(**settings, mode="llm2vec-gen", token_set=str(path)) for path in sets]
    classical = Encoder(**settings, mode="classical")
    backbone = registry.acquire(BackboneSpec.of(classical, *resolve(classical)), classical)
    some = texts[: max(4, len(texts) // 16)]
    mixed = [row for encoder in encoders for row in rows_of(encoder, some)]
    single = rows_of(encoders[0], some) * 16
    longer = [text + " the" * TOKENS for text in texts]
    sides: dict[str, Callable[[], Any]] = {
        "classical, 20 tokens more": lambda: classical.encode(longer),
        "llm2vec-gen": lambda: encoders[0].encode(texts),
        "one set": lambda: list(embed(backbone, single)),
        "sixteen sets": lambda: list(embed(backbone, mixed)),
    }
    print(f"{machine()}\n{len(texts)} texts; {len(mixed)} rows; {rounds} rounds interleaved\n")
    seconds = take_turns(sides, rounds)
    print("| | median s | ratio |\n|---|---|---|")
    for base, other in (("classical, 20 tokens more", "llm2vec-gen"), ("one set", "sixteen sets")):
        print(f"| {base} | {statistics.median(seconds[base]):.2f} | 1 |")
        print(f"| {other} | {statistics.median(seconds[other]):.2f} | {ratio(seconds, other, base):.3f} |")


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shape", choices=("mini", "0.6b"), default="mini")
    parser.add_argument("--texts", type=int, help="how many (default: 600 for mini, 32 for 0.6b)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model-folder", type=Path, default=Path(tempfile.gettempdir()) / "qwen3-0.6b-shape")
    args = parser.parse_args()
    count = args.texts or (600 if args.shape == "mini" else 32)
    texts = textbook_texts(args.data, count - count // 2, count // 2)
    folder = ASSETS / "echo-mini" if args.shape == "mini" else build_qwen3_600m(args.model_folder)
    with tempfile.TemporaryDirectory() as work:
        compare(folder, texts, args.rounds, args.dtype, Path(work))


if __name__ == "__main__":
    main()
