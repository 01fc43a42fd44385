"""The encoder against what people use now: same backbone, texts and precision, one copy of each text, mean-pooled.

    python benchmarks/versus.py --data FOLDER                  # a Qwen3-0.6B-shaped random model, 48 texts
    python benchmarks/versus.py --data FOLDER --shape mini     # echo-mini, 1 000 texts
    python benchmarks/versus.py --data FOLDER --instruction    # 20 tokens stand before every text

Sides: sentence-transformers with mean pooling, LangChain's HuggingFaceEmbeddings on top of it, the plain loop of
`encode.py` (always float32), echo mode, whose time is given for a token that the model processes, and the floor of
`limit.py`. Texts are half passages, half questions. Ratios are medians over rounds in which the sides take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from common import ASSETS, PlainLoop, build_qwen3_600m, machine, ratio, take_turns, textbook_texts
from langchain_huggingface import HuggingFaceEmbeddings
from limit import positions_of_batches, products
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from echo_integrations import Encoder
from echo_integrations.backbone import BackboneSpec
from echo_integrations.checkpoint import Checkpoint
from echo_integrations.config import Role
from echo_integrations.registry import registry
from echo_integrations.resolve import recipe_of, resolve

INSTRUCTION = "Given a question that a student of this book may ask, find the passage of the textbook that answers it:"


def save_as_sentence_transformer(folder: Path, work: Path) -> Path:
    """The same weights with mean pooling, as sentence-transformers keeps them.

    Without the chat template, if there is one, because it would put every text into that.
    """
    plain = work / "plain"
    shutil.copytree(folder, plain, ignore=shutil.ignore_patterns("chat_template*", "*.md"))
    config = json.loads((plain / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    transformer = Transformer(str(plain), max_seq_length=512)
    if transformer.tokenizer.pad_token is None:
        transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    SentenceTransformer(modules=[transformer, pooling]).save(str(work / "model"))
    return work / "model"


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shape", choices=("mini", "0.6b"), default="0.6b")
    parser.add_argument("--texts", type=int, help="how many (default: 1000 for mini, 48 for 0.6b)")
    parser.add_argument("--instruction", action="store_true", help="put 20 tokens before every text")
    parser.add_argument("--sides", nargs="+", default=["floor", "encoder", "echo", "sentence", "langchain", "loop"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model-folder", type=Path, default=Path(tempfile.gettempdir()) / "qwen3-0.6b-shape")
    args = parser.parse_args()
    count = args.texts or (1000 if args.shape == "mini" else 48)
    texts = textbook_texts(args.data, count - count // 2, count // 2)
    folder = ASSETS / "echo-mini" if args.shape == "mini" else build_qwen3_600m(args.model_folder)
    settings: dict[str, Any] = {"model": str(folder), "dtype": args.dtype, "show_progress": False}
    settings |= {"on_truncate": "truncate"}
    bos = Checkpoint.find(Encoder(**settings)).tokenizer.bos  # pooled like the text, as sentence-transformers does
    template = f"{{!{bos}%%prompt%% }}{{%%text%%}}" if args.instruction else f"{{{bos}%%text%%}}"
    settings |= {"document_instruction": INSTRUCTION} if args.instruction else {}
    encoder = Encoder(**settings, mode="classical", document_template=template)
    echo = Encoder(**{**settings, "document_instruction": None})
    backbone = registry.acquire(BackboneSpec.of(encoder, *resolve(encoder)), encoder)
    dtype = str(backbone.spec.torch_dtype).removeprefix("torch.")
    told = [f"{INSTRUCTION} {text}" for text in texts] if args.instruction else texts

    with tempfile.TemporaryDirectory() as work:
        where = str(save_as_sentence_transformer(folder, Path(work)))
        model = SentenceTransformer(where, model_kwargs={"dtype": dtype})
        chain = HuggingFaceEmbeddings(
            model_name=where,
            model_kwargs={"model_kwargs": {"dtype": dtype}},
            encode_kwargs={"normalize_embeddings": True},
        )
        loop = PlainLoop(folder)
        every: dict[str, Callable[[], Any]] = {
            "floor": products(backbone, positions_of_batches(encoder, backbone, texts)),
            "encoder": lambda: encoder.encode(texts),
            "echo": lambda: echo.encode(texts),
            "sentence": lambda: model.encode(told, normalize_embeddings=True, show_progress_bar=False),
            "langchain": lambda: chain.embed_documents(told),
            "loop": lambda: loop.encode(told),
        }
        print(f"{machine()}\n{len(texts)} texts, {dtype}, {args.rounds} rounds interleaved\n")
        if not args.instruction and "sentence" in args.sides:
            cosine = np.sum(every["encoder"]() * every["sentence"](), axis=1).min()
            print(f"smallest cosine between encoder and sentence-transformers: {cosine:.6f}\n")
        seconds = take_turns({name: every[name] for name in args.sides}, args.rounds)
    tokens = {}
    for name, side in (("encoder", encoder), ("echo", echo)):
        tokens[name] = sum(row.size for row in recipe_of(side, Role.DOCUMENT, *resolve(side)).render(texts))
    print("| side | median s | times the encoder's | us a token |\n|---|---|---|---|")
    for name, times in seconds.items():
        a_token = f"{statistics.median(times) / tokens[name] * 1e6:.0f}" if name in tokens else ""
        print(f"| {name} | {statistics.median(times):.2f} | {ratio(seconds, name, 'encoder'):.2f} | {a_token} |")


if __name__ == "__main__":
    main()
