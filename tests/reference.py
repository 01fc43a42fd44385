"""Echo embeddings written plainly and independently: one text, one piece, one position at a time."""

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer


def embed(
    folder: Path, template: str, texts: list[str], pooling: str = "mean", max_length: int = 512, prompt: str = ""
) -> NDArray[np.float32]:
    """What the paper's method gives, unnormalised; texts must hold no special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors = []
    for text in texts:
        ids: list[int] = []
        pooled: list[int] = []
        for piece in re.findall(r"{[^{}]*}|[^{}]+", template):
            inside = piece.strip("{}").removeprefix("!")
            if piece.startswith("{"):
                inside = "".join(
                    {"%%text%%": text, "%%prompt%%": prompt}.get(part, part)
                    for part in re.split("(%%text%%|%%prompt%%)", inside)
                )
            piece_ids = tokenizer(inside, add_special_tokens=False)["input_ids"]
            piece_ids = piece_ids[:max_length] if "%%" in piece else piece_ids
            if piece.startswith("{") and not piece.startswith("{!"):
                pooled += range(len(ids), len(ids) + len(piece_ids))
            ids += piece_ids
        with torch.no_grad():
            inputs = torch.tensor([ids])
            hidden = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state[0]
        vectors.append((hidden[pooled].mean(0) if pooling == "mean" else hidden[pooled[-1]]).numpy())
    return np.stack(vectors)
