"""How near the encoder comes to its limit: the model's own matrix products at the batches' shapes, back to back.

    python benchmarks/limit.py --data FOLDER                  # a Qwen3-0.6B-shaped random model, 24 passages
    python benchmarks/limit.py --data FOLDER --shape mini     # echo-mini, 400 passages

The floor holds the products of every linear layer with the positions of every batch (padding that the encoder runs is
in it), written into memory that is there already: no attention, norms, activations, tokens, or memory management. The
share is the floor's time over the encoder's, the median over rounds in which the sides take turns.

On a GPU the model FLOPs utilisation is printed, too: 2 operations a weight and token, over --peak, the dense peak of
the device in TFLOP/s (989 for an H100 or H200 in bfloat16).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ASSETS, build_qwen3_600m, machine, ratio, take_turns, textbook_texts

from echo_integrations import Encoder
from echo_integrations.backbone import Backbone, BackboneSpec
from echo_integrations.batching import plan
from echo_integrations.config import Role
from echo_integrations.registry import registry
from echo_integrations.resolve import recipe_of, resolve


def positions_of_batches(encoder: Encoder, backbone: Backbone, texts: Sequence[str]) -> list[int]:
    """Rows times longest row of each batch that the encoder makes of the texts."""
    rendered = recipe_of(encoder, Role.DOCUMENT, *resolve(encoder)).render(texts)
    sizes = [row.size for row in rendered]
    return [len(batch) * sizes[batch[0]] for batch in plan(sizes, encoder.token_budget or backbone.token_budget)]


def products(backbone: Backbone, positions: Sequence[int]) -> Callable[[], None]:
    """Runs the products of the model's linear layers with so many rows each."""
    weights = [m.weight for m in backbone.model.modules() if isinstance(m, torch.nn.Linear)]
    most = max(positions)
    like: dict[str, Any] = {"dtype": weights[0].dtype, "device": weights[0].device}
    inputs = {n: torch.randn(most, n, **like) for n in {w.shape[1] for w in weights}}
    outputs = {n: torch.empty(most, n, **like) for n in {w.shape[0] for w in weights}}

    def run() -> None:
        with torch.inference_mode():
            for rows in positions:
                for weight in weights:
                    torch.mm(inputs[weight.shape[1]][:rows], weight.t(), out=outputs[weight.shape[0]][:rows])
        if weights[0].is_cuda:
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shape", choices=("mini", "0.6b"), default="0.6b")
    parser.add_argument("--model", type=Path, help="another model's folder")
    parser.add_argument("--texts", type=int, help="passages (default: 400 for mini, 24 for 0.6b)")
    parser.add_argument("--modes", nargs="+", default=["classical", "echo"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device")
    parser.add_argument("--model-folder", type=Path, default=Path(tempfile.gettempdir()) / "qwen3-0.6b-shape")
    args = parser.parse_args()
    texts = textbook_texts(args.data, args.texts or (400 if args.shape == "mini" else 24), 0)
    folder = args.model or (ASSETS / "echo-mini" if args.shape == "mini" else build_qwen3_600m(args.model_folder))
    settings: dict[str, Any] = {"model": str(folder), "dtype": args.dtype, "show_progress": False}
    settings |= {"on_truncate": "truncate", **({"compile": True} if args.compile else {})}
    print(f"{machine()}\n{len(texts)} passages, {args.rounds} rounds interleaved\n")
    print("| mode | positions | floor s | encoder s | share of the floor | model FLOPs utilisation |")
    print("|---|---|---|---|---|---|")
    for mode in args.modes:
        encoder = Encoder(**settings, mode=mode)
        backbone = registry.acquire(BackboneSpec.of(encoder, *resolve(encoder)), encoder)
        positions = positions_of_batches(encoder, backbone, texts)
        floor, own = "floor", "encoder"
        sides: dict[str, Callable[[], Any]] = {
            floor: products(backbone, positions),
            own: partial(encoder.encode, texts),
        }
        seconds = take_turns(sides, args.rounds)
        weights = sum(m.weight.numel() for m in backbone.model.modules() if isinstance(m, torch.nn.Linear))
        middle = {name: statistics.median(times) for name, times in seconds.items()}
        used = f"{2 * weights * sum(positions) / middle[own] / args.peak / 1e12:.2f}" if args.peak else ""
        print(
            f"| {mode} | {sum(positions)} | {middle[floor]:.2f} | {middle[own]:.2f} | "
            f"{ratio(seconds, floor, own):.2f} | {used} |"
        )


if __name__ == "__main__":
    main()
