"""What the benchmarks share: texts, a Qwen3-0.6B-shaped random model, the plain loop, and a word on the machine."""

from __future__ import annotations

import json
import lzma
import os
import platform
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from echo_integrations.device import cpu_multiplies_bfloat16

ASSETS = Path(__file__).parents[1] / "echo_integrations" / "assets"


def textbook_texts(data: Path, chunks: int, questions: int, seed: int = 0) -> list[str]:
    """Textbook passages of about 150 words and review questions, shuffled."""
    passages: list[str] = []
    with lzma.open(data / "textbooks.jsonl.xz", "rt", encoding="utf-8") as file:
        for line in file:
            module = json.loads(line)
            words = " ".join(text for kind, text in module["sections"] if kind == "p").split()
            passages += [f"{module['title']}. {' '.join(words[i : i + 150])}" for i in range(0, len(words), 150)]
    with (data / "questions_dev.jsonl").open(encoding="utf-8") as file:
        asked = [json.loads(line)["question"] for line in file]
    choose = random.Random(seed)
    texts = choose.sample(passages, chunks) + choose.sample(asked, questions)
    choose.shuffle(texts)
    return texts


def build_qwen3_600m(folder: Path) -> Path:
    """A random model of Qwen3-0.6B's shape in bfloat16 (1.2 GB) with echo-mini's tokenizer, built once."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
        )
        model: torch.nn.Module = Qwen3ForCausalLM(config)
        model.to(torch.bfloat16)
        model.save_pretrained(folder)  # type: ignore[operator]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ASSETS / "echo-mini" / name, folder / name)
    return folder


class PlainLoop:
    """What a developer writes first: batches of 32 in input order, padded, masked, fp32, mean-pooled."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, D) unit vectors of one copy of each text."""
        vectors = []
        for start in range(0, len(texts), 32):
            batch = self.tokenizer(
                list(texts[start : start + 32]), padding=True, truncation=True, max_length=512, return_tensors="pt"
            )
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(vectors).numpy()


def take_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, the sides by turns; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
            print(f"round {number}, {name}: {time.perf_counter() - start:.2f} s", file=sys.stderr, flush=True)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], slow: str, quick: str) -> float:
    """How many times as long one side takes as another: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[quick], strict=True))


def count_tokens(texts: Sequence[str], folder: Path) -> int:
    """Tokens of the texts, each cut to 512; padding is not counted."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return sum(min(len(ids), 512) for ids in tokenizer(list(texts))["input_ids"])


def machine() -> str:
    """Processor, threads and versions, in a line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return (
        f"{name}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}, "
        f"bf16 {'in hardware' if cpu_multiplies_bfloat16() else 'not in hardware'}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    )
