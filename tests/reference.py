"""Both methods written plainly and independently: one text, one piece, one position at a time."""

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


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


def embed_gen(
    folder: Path, token_set: Path, texts: list[str], compression: int, max_length: int = 512
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """LLM2Vec-Gen embeddings and soft prompts, unnormalised: both maps on every compression token, then the mean."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(token_set / "tokens.safetensors")
    rows = tensors["rows"]
    size = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(size + len(rows), mean_resizing=False)
    model.get_input_embeddings().weight.data[size:] = rows
    vectors, soft_prompts = [], []
    for text in texts:
        ids = tokenizer(text)["input_ids"][: max_length - len(rows)]
        extended = ids + list(range(size, size + len(rows)))
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([extended])).last_hidden_state[0, -compression:]
            soft = hidden @ tensors["reconstruction.weight"].T + tensors["reconstruction.bias"]
            vectors.append((soft @ tensors["alignment.weight"].T + tensors["alignment.bias"]).mean(0).numpy())
        soft_prompts.append(soft.numpy())
    return np.stack(vectors), np.stack(soft_prompts)


def answer(folder: Path, soft_prompt: NDArray[np.float32], max_new_tokens: int, end: set[int]) -> list[int]:
    """Greedy continuation of a soft prompt, the whole sequence run again for every token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = torch.from_numpy(soft_prompt)[None]
    ids: list[int] = []
    with torch.no_grad():
        for _ in range(max_new_tokens):
            token = int(model(inputs_embeds=inputs).logits[0, -1].argmax())
            if token in end:
                break
            ids.append(token)
            inputs = torch.cat([inputs, model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    return ids
