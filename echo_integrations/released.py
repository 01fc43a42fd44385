"""The layout of the released LLM2Vec-Gen checkpoints (``McGill-NLP/LLM2Vec-Gen-*``): read and written.

The two linear maps of that layout are files of ``torch.save``. They are read with ``weights_only=True`` and nothing
else; `write` is the only place of the package that writes such files, because the released code reads no others.

This module knows nothing of token sets' own format, encoders or running models.

Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModel

from echo_integrations.config import TokenSetError
from echo_integrations.tokenizer import TextTokenizer

RUN_CONFIG = "run_config.yml"
FILES = (RUN_CONFIG, "encoder_decoder_config.json", "encoder/*", "reconstruction_mlp", "alignment_mlp", "tokenizer*")
"""What there is to download of such a checkpoint."""

_MODE = re.compile(r"last_(\d+)_tokens")
_DELTA = "trainable_tokens_delta"
_LORA = re.compile(r"lora_|\.dora")


@dataclass(frozen=True)
class Contents:
    """What a released checkpoint holds.

    Attributes:
        model_name: the backbone, as ``run_config.yml`` names it.
        special_tokens: names of the M trained tokens.
        compression: how many of them are read, the last ones.
        rows: (M, H) their embedding rows.
        maps: ``reconstruction.weight`` (H, H), ``alignment.weight`` (D, H), and a ``.bias`` of each.
        lora_config: the PEFT configuration of an adapter on the backbone, or None.
        lora: the adapter's tensors by PEFT's names.
        vocabulary: token ids of the tokenizer that it was trained with, less the trained tokens.
    """

    model_name: str
    special_tokens: tuple[str, ...]
    compression: int
    rows: Tensor
    maps: Mapping[str, Tensor]
    lora_config: Mapping[str, Any] | None
    lora: Mapping[str, Tensor]
    vocabulary: Mapping[str, int]


def is_released(folder: Path) -> bool:
    """Whether a folder is laid out like a released checkpoint."""
    return (folder / RUN_CONFIG).is_file()


def read_header(folder: Path) -> tuple[str, tuple[str, ...], int]:
    """Backbone, names of the trained tokens, and how many are read; no weights.

    Raises:
        TokenSetError: unreadable, or an encoding mode that is not known.
    """
    path = folder / RUN_CONFIG
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        model_name, names = str(config["model_name_or_path"]), tuple(map(str, config["special_tokens"]))
        mode = str(config["encoding_mode"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise TokenSetError(f"{path} cannot be read ({type(error).__name__}: {error}): download it again") from error
    found = _MODE.fullmatch(mode)
    if found is None or not 1 <= int(found[1]) <= len(names):
        raise TokenSetError(
            f"{path}: encoding_mode {mode!r} with {len(names)} special_tokens is none that can be read here "
            "(last_<N>_tokens, N at most the number of tokens)"
        )
    return model_name, names, int(found[1])


def read(folder: Path) -> Contents:
    """Read a checkpoint in full.

    Raises:
        TokenSetError: a part is missing, damaged, of another size, or holds more than tensors.
    """
    model_name, names, compression = read_header(folder)
    tokenizer = TextTokenizer.load(folder)
    vocabulary = tokenizer.vocabulary()
    ids = {name: vocabulary.pop(name, None) for name in names}
    rows, lora_config, lora = _read_encoder(folder / "encoder", ids)
    maps = {
        f"{name}.{part}": tensor
        for name in ("reconstruction", "alignment")
        for part, tensor in _read_map(folder / f"{name}_mlp").items()
    }
    return Contents(model_name, names, compression, rows, maps, lora_config, lora, vocabulary)


def _read_encoder(
    folder: Path, ids: Mapping[str, int | None]
) -> tuple[Tensor, Mapping[str, Any] | None, dict[str, Tensor]]:
    """(M, H) rows in the order of the tokens, and the LoRA adapter around them, if there is one."""
    path = folder / "adapter_model.safetensors"
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(path)
        kind = str(config["peft_type"])
    except Exception as error:  # safetensors' errors have no common base
        raise TokenSetError(f"{folder} cannot be read ({type(error).__name__}: {error}): download it again") from error
    if kind == "TRAINABLE_TOKENS":
        indices = config.get("token_indices")
    elif kind == "LORA":
        indices = config.get("trainable_token_indices")
        indices = next(iter(indices.values()), None) if isinstance(indices, dict) else indices
    else:
        raise TokenSetError(f"{folder} is a PEFT adapter of type {kind}: only TRAINABLE_TOKENS and LORA can be read")
    deltas = [tensor for key, tensor in tensors.items() if key.endswith(_DELTA)]
    if len(deltas) != 1 or not indices or len(indices) != len(deltas[0]):
        raise TokenSetError(
            f"{path} has {len(deltas)} tensors of trained tokens for {len(indices or ())} token indices: "
            "it is damaged, or not of an LLM2Vec-Gen checkpoint"
        )
    missing = [name for name, i in ids.items() if i not in indices]
    if missing:
        raise TokenSetError(f"{path} has no row for {', '.join(missing)}: {folder.parent} is of several checkpoints")
    rows = deltas[0][[list(indices).index(i) for i in ids.values()]].float()
    if kind == "TRAINABLE_TOKENS":
        return rows, None, {}
    lora = {key: tensor for key, tensor in tensors.items() if _LORA.search(key)}
    unknown = [key for key in tensors if key not in lora and not key.endswith((_DELTA, "base_layer.weight"))]
    if unknown or not lora:
        raise TokenSetError(f"{path} holds {', '.join(unknown) or 'no LoRA tensors'}, which is not understood here")
    return rows, {k: v for k, v in config.items() if k != "trainable_token_indices"}, lora


def _read_map(path: Path) -> dict[str, Tensor]:
    """Weight and bias of a linear map."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        tensors = {part: state[f"projection.{part}"].float() for part in ("weight", "bias")}
    except Exception as error:  # unpickling errors have no common base
        # what torch says of a pickle that would run code is how to let it
        why = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise TokenSetError(
            f"{path} cannot be read as a linear map ({why}); it is read with weights_only=True, which runs no code: "
            "download it again, or do not trust it"
        ) from error
    if set(state) != {"projection.weight", "projection.bias"}:
        raise TokenSetError(f"{path} holds {', '.join(sorted(state))}: only a single linear map can be read")
    return tensors


def write(folder: Path, contents: Contents, tokenizer: Any, config: Any) -> None:
    """Write a checkpoint that the released code reads, into an existing folder.

    Args:
        folder: where.
        contents: what; its vocabulary is not used.
        tokenizer: a transformers tokenizer of the backbone that nobody else uses; it is given the trained tokens.
        config: a transformers configuration of the backbone that nobody else uses.

    Raises:
        TokenSetError: the tokenizer knows a trained token's name already, as something else.
    """
    names = list(contents.special_tokens)
    known = [name for name in names if name in tokenizer.get_vocab()]
    if known:
        raise TokenSetError(f"the backbone's tokenizer has {', '.join(known)} already: rename the tokens of the set")
    tokenizer.add_special_tokens({"extra_special_tokens": names}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(names)]
    rows, embedding = contents.rows, _embedding_name(config)
    encoder = folder / "encoder"
    encoder.mkdir()
    config.num_special_tokens = len(names)
    config.vocab_size = max(len(tokenizer), max(ids) + 1)
    config.save_pretrained(encoder)
    if contents.lora_config is None:
        adapter: dict[str, Any] = {"peft_type": "TRAINABLE_TOKENS", "target_modules": embedding}
        adapter |= {"token_indices": ids, "init_weights": True, "task_type": None}
        tensors = {f"base_model.model.{embedding}.{_DELTA}": rows}
    else:
        adapter = {**contents.lora_config, "trainable_token_indices": {embedding: ids}}
        tensors = {**contents.lora, f"base_model.model.{embedding}.token_adapter.{_DELTA}": rows}
    adapter |= {"base_model_name_or_path": contents.model_name, "inference_mode": True}
    (encoder / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
    content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    (encoder / "adapter_model.safetensors").write_bytes(content)
    for name in ("reconstruction", "alignment"):
        weight, bias = (contents.maps[f"{name}.{part}"] for part in ("weight", "bias"))
        shape = {"input_dim": weight.shape[1], "output_dim": weight.shape[0], "dtype": "torch.float32", "size": 1}
        torch.save(
            {
                "state_dict": {"projection.weight": weight.contiguous(), "projection.bias": bias.contiguous()},
                "config": {**shape, "pooling_mode": "linear"},
            },
            folder / f"{name}_mlp",
        )
    run = {"model_name_or_path": contents.model_name, "torch_dtype": "float32", "max_input_length": 512}
    run |= {"special_tokens": names, "encoding_mode": f"last_{contents.compression}_tokens"}
    (folder / RUN_CONFIG).write_text(yaml.safe_dump(run), encoding="utf-8")
    mode = {"encoding_mode": run["encoding_mode"], "save_decoder": False}
    (folder / "encoder_decoder_config.json").write_text(json.dumps(mode, indent=2) + "\n", encoding="utf-8")


def _embedding_name(config: Any) -> str:
    """What the backbone calls its embedding matrix."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    embedding = model.get_input_embeddings()
    return next(str(name) for name, module in model.named_modules() if module is embedding)
