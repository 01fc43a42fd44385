"""One training step of LLM2Vec-Gen: this package's against the released scheme, written plainly.

    python benchmarks/train_step.py                  # Qwen3-0.6B's shape, random weights
    python benchmarks/train_step.py --shape mini     # echo-mini

Plain: one copy of the model as encoder and one as decoder, autograd through the whole query, the teacher (a third
model of the same shape) in every step, gradient checkpointing, logits of every position. Here: one copy, the query
without autograd into a cache, the teacher's vectors at hand. Both do the whole step, optimiser included, on the same
numbers. They take turns, each in a process of its own; peak memory is that of the steps, weights included.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ASSETS, build_qwen3_600m, machine
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from echo_integrations.backbone import BackboneSpec, load
from echo_integrations.checkpoint import Checkpoint
from echo_integrations.training.config import TrainingConfig
from echo_integrations.training.loop import optimizer
from echo_integrations.training.model import Batch, Student

TOKENS, READ = 20, 10  # trained tokens, and how many of them are read
Step = Callable[[], tuple[float, Tensor]]


def texts(vocabulary: int, batch: int, query: int, response: int) -> tuple[Any, Any]:
    """(B, Q) and (B, R) random token ids."""
    draw = np.random.default_rng(0)
    queries, responses = (draw.integers(10, vocabulary, (batch, size)).astype(np.int32) for size in (query, response))
    return queries, responses


def start(hidden: int) -> dict[str, Tensor]:
    """Rows and maps that both sides begin with."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"rows": (TOKENS, hidden)} | {
        f"{name}.{part}": (hidden, hidden) if part == "weight" else (hidden,)
        for name in ("reconstruction", "alignment")
        for part in ("weight", "bias")
    }
    return {name: 0.03 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def plain(folder: Path, device: str, dtype: torch.dtype, ids: tuple[Any, Any]) -> Step:
    """The released scheme."""

    def model() -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return loaded.to(device).requires_grad_(False)

    encoder, decoder, teacher = model(), model(), model().base_model.eval()
    for checkpointed in (encoder, decoder):
        name = "activation_checkpointing_enable"
        getattr(checkpointed, name, checkpointed.gradient_checkpointing_enable)({"use_reentrant": False})
        checkpointed.train()
    embedding = encoder.get_input_embeddings()
    trained = {k: torch.nn.Parameter(v.to(device)) for k, v in start(embedding.weight.shape[1]).items()}
    adam = torch.optim.Adam(trained.values(), lr=3e-4)
    queries, responses = (torch.from_numpy(part).long().to(device) for part in ids)

    def step() -> tuple[float, Tensor]:
        rows = trained["rows"].to(dtype).expand(len(queries), -1, -1)
        inputs = torch.cat([embedding(queries), rows], dim=1)
        mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=device)
        hidden = encoder.base_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        states = hidden[:, -READ:].float()
        prompts = linear(states, trained["reconstruction.weight"], trained["reconstruction.bias"])
        embedded = linear(prompts, trained["alignment.weight"], trained["alignment.bias"]).mean(dim=1)
        with torch.no_grad():
            target = teacher(input_ids=responses).last_hidden_state.float().mean(dim=1)
        said = torch.cat([prompts.to(dtype), decoder.get_input_embeddings()(responses)], dim=1)
        labels = torch.cat([torch.full((len(responses), READ), -100, device=device), responses], dim=1)
        mask = torch.ones(said.shape[:2], dtype=torch.long, device=device)
        reconstruction = decoder(inputs_embeds=said, attention_mask=mask, labels=labels, use_cache=False).loss
        loss = reconstruction + (embedded - target).square().mean()
        loss.backward()
        return loss.item(), finish(trained["rows"], adam)

    return step


def ours(folder: Path, device: str, dtype: torch.dtype, ids: tuple[Any, Any], parts: int) -> Step:
    """This package's step, the batch taken in parts, which changes neither loss nor gradient."""
    config = TrainingConfig(model=str(folder), device=device, dtype=str(dtype).removeprefix("torch."))
    settings = config.settings()
    backbone = load(BackboneSpec.of(settings, Checkpoint.find(settings)))
    queries, responses = ids
    with torch.no_grad():  # what a run finds on disk
        hidden = [backbone.model(input_ids=torch.from_numpy(r).long()[None].to(device)) for r in responses]
        targets = torch.stack([h.last_hidden_state[0].float().mean(dim=0) for h in hidden]).cpu()
    student = Student(backbone, targets.shape[1], config)
    student.load_state_dict(start(targets.shape[1]))
    adam = optimizer(student, config)
    share = len(queries) // parts
    cuts = [slice(first, first + share) for first in range(0, len(queries), share)]
    batches = [Batch([], list(queries[cut]), list(responses[cut]), targets[cut]) for cut in cuts]

    def step() -> tuple[float, Tensor]:
        total = 0.0
        for batch in batches:
            terms = student.train()(batch)
            loss = terms["reconstruction"] / responses.size + terms["alignment"] / len(queries)
            loss.backward()
            total += loss.item()
        return total, finish(student.rows, adam)

    return step


def finish(rows: torch.nn.Parameter, adam: torch.optim.Adam) -> Tensor:
    """The optimiser's step; the gradient of the rows that it took."""
    assert rows.grad is not None
    gradient = rows.grad.detach().float().cpu().clone()
    adam.step()
    adam.zero_grad()
    return gradient


def work(args: argparse.Namespace) -> None:
    """One side, in a process of its own: a step for each line that comes in, an answer for each in JSON."""
    folder = Path(args.folder)
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    ids = texts(vocabulary, args.batch, args.query, args.response)
    place = folder, args.device, getattr(torch, args.dtype), ids
    step = plain(*place) if args.side == "plain" else ours(*place, args.parts)
    cuda = args.device.startswith("cuda")
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # peak so far := now
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss, gradient = step()
        seconds = time.perf_counter() - begin
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        peak = torch.cuda.max_memory_allocated() if cuda else resident
        print(json.dumps([seconds, peak, loss, gradient.tolist()]), flush=True)


def main() -> None:
    """Run both sides in turn and print times, memory and agreement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["0.6b", "mini"], default="0.6b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--query", type=int, default=128, help="tokens of each query")
    parser.add_argument("--response", type=int, default=64, help="tokens of each response")
    parser.add_argument("--parts", type=int, default=2, help="in which this package's side takes the batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", help="where the random model is kept; a temporary folder unless given")
    parser.add_argument("--side", choices=["plain", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(args.folder or temporary)
        folder = ASSETS / "echo-mini" if args.shape == "mini" else build_qwen3_600m(kept)
        print(machine())
        compare(args, folder)


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Let the two sides take turns."""
    names = ("batch", "query", "response", "parts", "device", "dtype")
    options = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    sides: dict[str, Any] = {}
    for side in ("plain", "ours"):
        command = [sys.executable, __file__, "--side", side, "--folder", str(folder), *options]
        sides[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if sides[side].stdout.readline().strip() != "ready":
            raise SystemExit(f"the process of {side} ended")
    found: dict[str, list[Any]] = {side: [] for side in sides}
    for number in range(args.rounds + 1):
        for side in list(sides) if number % 2 else list(sides)[::-1]:
            sides[side].stdin.write("step\n")
            sides[side].stdin.flush()
            found[side].append(json.loads(sides[side].stdout.readline()))
            print(f"  round {number} {side}: {found[side][-1][0]:.2f} s, loss {found[side][-1][2]:.6f}", flush=True)
    for process in sides.values():
        process.stdin.close()
        process.wait()
    seconds = {side: statistics.median(row[0] for row in rows[1:]) for side, rows in found.items()}  # first: warm-up
    peaks = {side: max(row[1] for row in rows) for side, rows in found.items()}
    ratio = statistics.median(p[0] / o[0] for p, o in zip(found["plain"][1:], found["ours"][1:], strict=True))
    losses = {side: rows[0][2] for side, rows in found.items()}
    gradients = {side: np.array(rows[0][3]) for side, rows in found.items()}
    difference = np.abs(gradients["ours"] - gradients["plain"]).max() / np.abs(gradients["plain"]).max()
    for side in sides:
        print(f"{side:>6}: {seconds[side]:.2f} s a step, peak {peaks[side] / 1e9:.2f} GB")
    print(f"step {ratio:.2f} x faster, peak memory {peaks['ours'] / peaks['plain']:.2f} of it")
    print(f"loss differs by {abs(losses['ours'] / losses['plain'] - 1):.1e}, the rows' gradient by {difference:.1e}")


if __name__ == "__main__":
    main()
