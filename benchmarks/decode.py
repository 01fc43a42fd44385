"""Time the decoding of 32 embeddings to 64 tokens: batched and cached, against one at a time without a cache.

    python benchmarks/decode.py                              # echo-mini
    python benchmarks/decode.py --shape 0.6b --texts 8       # a Qwen3-0.6B-shaped random model

The other side is the released code's way: the whole sequence goes through the model again for every token. No answer
ends early (the end-of-sequence tokens are taken away), so that both sides write the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import ASSETS, build_qwen3_600m, machine
from token_sets import random_token_set

from echo_integrations import Encoder, backbone
from echo_integrations.backbone import Backbone, BackboneSpec
from echo_integrations.registry import registry
from echo_integrations.resolve import resolve


@torch.inference_mode()
def one_at_a_time(loaded: Backbone, soft_prompts: torch.Tensor, tokens: int) -> list[list[int]]:
    """Greedy decoding without a cache."""
    answers = []
    for prompt in soft_prompts:
        inputs = prompt[None].to(loaded.spec.torch_dtype)
        ids = []
        for _ in range(tokens):
            ids.append(int(loaded.lm(inputs_embeds=inputs, use_cache=False).logits[0, -1].argmax()))
            inputs = torch.cat([inputs, loaded.model.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
        answers.append(ids)
    return answers


def main() -> None:
    """Run the benchmark and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("mini", "0.6b"), default="mini")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model-folder", type=Path, default=Path(tempfile.gettempdir()) / "qwen3-0.6b-shape")
    args = parser.parse_args()
    folder = ASSETS / "echo-mini" if args.shape == "mini" else build_qwen3_600m(args.model_folder)
    with tempfile.TemporaryDirectory() as work:
        token_set = random_token_set(folder, Path(work) / "set", seed=0)
        encoder = Encoder(model=str(folder), mode="llm2vec-gen", token_set=str(token_set), dtype=args.dtype)
        loaded = registry.acquire(BackboneSpec.of(encoder, *resolve(encoder)), encoder)
        soft_prompts = torch.from_numpy(
            encoder.encode([f"question {i} about valves" for i in range(args.texts)], return_soft_prompts=True)[1]
        )
    backbone.end_of_sequence = lambda lm, eos_id: []
    seconds: dict[str, list[float]] = {"one at a time": [], "batched": []}
    for number in range(args.rounds + 1):
        start = time.perf_counter()
        theirs = one_at_a_time(loaded, soft_prompts, args.tokens)
        middle = time.perf_counter()
        with torch.inference_mode():
            ours = loaded.generate(soft_prompts, args.tokens)
        end = time.perf_counter()
        if number:  # the first round warms up
            seconds["one at a time"].append(middle - start)
            seconds["batched"].append(end - middle)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print(f"{machine()}\n{args.texts} embeddings, {args.tokens} tokens each, shape {args.shape}, {args.dtype}")
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s (median of {args.rounds})")
    print(f"ratio {ratio:.1f}; {same} of {args.texts} answers are the same, token for token")


if __name__ == "__main__":
    main()
