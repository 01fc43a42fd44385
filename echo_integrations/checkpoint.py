"""A model on disk: where it is, what it says of itself, and which vector space its files define.

Everything that can be known without loading weights is here. This module knows nothing of templates and
never runs a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from pydantic import SecretStr
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig

from echo_integrations.config import BUILT_IN_MODEL, EncoderSettings, ModelLoadError
from echo_integrations.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_ASSETS = Path(__file__).parent / "assets"
_DOWNLOADED = ["*.json", "run_config.yml", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.safetensors"]
_NOT_DOWNLOADED = ["*/*", "consolidated*"]
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tekken.json")
_NO_PART_OF_THE_SPACE = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)
_NO_PART_OF_AN_ADAPTER = frozenset({"base_model_name_or_path", "inference_mode", "peft_version", "revision"})
_SHAPE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings"),
)
_NO_MODEL = {  # a file that shows what a folder without config.json is, and how to use it
    "adapter_config.json": "it is an adapter: name its backbone as the model and this as adapter=",
    "run_config.yml": "it is an LLM2Vec-Gen checkpoint: use it with mode='llm2vec-gen' and no token_set=, or name "
    "its backbone as the model and this as token_set=",
    "token_set.json": "it is a token set: use it with mode='llm2vec-gen', as token_set=",
}
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")  # the Hub's cache names a large file by its SHA-256


@dataclass(frozen=True)
class Checkpoint:
    """A backbone's files, with an optional adapter to merge.

    Attributes:
        name: as the user wrote it.
        folder: where its files are.
        adapter: where the adapter's files are, or None.
        trust_remote_code: whether the model's own Python code may run.

    Example:
        >>> Checkpoint.find(EncoderSettings(model="echo-mini")).hidden_size
        256
    """

    name: str = field(compare=False)
    folder: Path
    adapter: Path | None
    trust_remote_code: bool

    @staticmethod
    def find(settings: EncoderSettings, model_name: str | None = None, revision: str | None = None) -> Checkpoint:
        """Find a model's files: the built-in model, a local folder, or the Hub (downloaded at need).

        Args:
            settings: say where to look, and for what,
            model_name: unless another model is named,
            revision: at that model's revision.

        Raises:
            ModelLoadError: nothing there, not reachable, or no model.
        """
        where = Place.of(settings)
        name, at = (settings.model_name, settings.revision) if model_name is None else (model_name, revision)
        folder = where.find(name, at, settings.trust_remote_code)
        if not (folder / "config.json").is_file():
            raise ModelLoadError(
                f"{folder} has no config.json: it is not a model folder, or its download was not finished"
                + next((f"; {advice}" for name, advice in _NO_MODEL.items() if (folder / name).is_file()), "")
            )
        adapter = None
        if settings.adapter is not None:
            adapter = where.find(settings.adapter)
            if not (adapter / "adapter_config.json").is_file():
                raise ModelLoadError(f"{adapter} has no adapter_config.json: it is not a PEFT adapter")
        return Checkpoint(name, folder, adapter, settings.trust_remote_code)

    @property
    def config(self) -> Any:
        """The transformers configuration of the text model.

        Raises:
            ModelLoadError: unreadable, in need of remote code, or not of a decoder-only model.
        """
        with _one_at_a_time:
            return _config(self.folder, self.trust_remote_code, _stat(self.folder / "config.json"))

    @property
    def hidden_size(self) -> int:
        """Components of the last hidden state."""
        return int(getattr(self.config, "word_embed_proj_dim", self.config.hidden_size))  # the first is OPT's

    @property
    def positions(self) -> int | None:
        """Positions that the backbone has, or None where nothing bounds them."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, loaded once per process."""
        with _one_at_a_time:
            return _tokenizer(self.folder, self.trust_remote_code, tuple(map(_stat, self._tokenizer_files())))

    @property
    def signature(self) -> tuple[tuple[str, int, int], ...]:
        """Path, size and time of every file that is loaded: cheap, and changes when one is replaced."""
        configs = [self.folder / "config.json"] + ([self.adapter / "adapter_config.json"] if self.adapter else [])
        return tuple(_stat(path) for path in configs + self._weights())

    def digest(self) -> dict[str, str]:
        """What defines the vector space, by content: hashes of configuration, weights, tokenizer and adapter.

        Local folders are read once per process (by size and time); Hub downloads carry their hashes.
        """
        tokenizer = self._tokenizer_files()
        digest = {
            "config": _hash_json(*_stat(self.folder / "config.json"), _NO_PART_OF_THE_SPACE),
            "weights": _hash_files(self._weights(self.folder)),
            "tokenizer": (
                _hash_json(*_stat(tokenizer[0]), frozenset({"truncation", "padding"}))
                if tokenizer and tokenizer[0].name == "tokenizer.json"
                else _hash_files(tokenizer)
            ),
        }
        if self.adapter is not None:
            digest["adapter"] = _hash_json(*_stat(self.adapter / "adapter_config.json"), _NO_PART_OF_AN_ADAPTER)
            digest["adapter_weights"] = _hash_files(self._weights(self.adapter))
        return digest

    @property
    def revision(self) -> str | None:
        """The commit of a Hub download, which names the folder that it lies in; None for other folders."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def identity(self) -> dict[str, Any]:
        """What tells this backbone from others, whatever the dtype, the shards or the library that it was saved with.

        Shape and vocabulary, and a hash of a few numbers of every tensor, rounded to bfloat16: quick to compute, and
        different between a base model and its fine-tuned variants, which share everything else.
        """
        config = self.config
        shape = {name: getattr(config, name, None) for name in _SHAPE}
        vocabulary = json.dumps(sorted(self.tokenizer.vocabulary().items()))
        identity = {
            "hidden_size": self.hidden_size,
            "config": hashlib.sha256(json.dumps(shape).encode()).hexdigest(),
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "weights": _sample_weights(tuple(map(_stat, self._weights(self.folder)))),
        }
        if self.adapter is not None:
            identity["adapter"] = _hash_files(self._weights(self.adapter))
        return identity

    def _tokenizer_files(self) -> list[Path]:
        return [self.folder / name for name in _TOKENIZER_FILES if (self.folder / name).is_file()]

    def _weights(self, folder: Path | None = None) -> list[Path]:
        """The weight files of one folder, or of backbone and adapter."""
        if folder is None:
            return self._weights(self.folder) + (self._weights(self.adapter) if self.adapter else [])
        names = _ADAPTER_FILES if folder == self.adapter else _WEIGHT_FILES
        for name in names:  # in the order in which transformers looks for them
            if (folder / name).is_file():
                return [folder / name]
            index = folder / f"{name}.index.json"
            if index.is_file():
                shards = sorted(set(_read_json(index)["weight_map"].values()))
                missing = [shard for shard in shards if not (folder / shard).is_file()]
                if missing:
                    raise ModelLoadError(
                        f"{folder} is half-downloaded: {', '.join(missing)} named by {index.name} "
                        f"{'is' if len(missing) == 1 else 'are'} missing; download the model again"
                    )
                return [folder / shard for shard in shards]
        raise ModelLoadError(f"{folder} has no weights ({' or '.join(names)}): was its download finished?")


_one_at_a_time = threading.Lock()  # the caches below do not keep two threads from loading the same thing at once


def _unlock_after_fork() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)


@dataclass(frozen=True)
class Place:
    """Where names are looked up: local folders, and the Hub with these credentials and this cache."""

    token: str | None = None
    cache_folder: str | None = None

    @staticmethod
    def of(settings: EncoderSettings) -> Place:
        """As settings say."""
        token = settings.token.get_secret_value() if isinstance(settings.token, SecretStr) else None
        return Place(token, settings.cache_folder)

    def find(
        self, name: str, revision: str | None = None, code: bool = False, patterns: tuple[str, ...] | None = None
    ) -> Path:
        """The folder of a model, adapter or token set; downloaded from the Hub unless it is a local one.

        Args:
            name: folder, Hub id or ``"echo-mini"``.
            revision: of the Hub.
            code: whether to download Python files.
            patterns: the files to download; those of a model unless given.

        Raises:
            ModelLoadError: nothing there, or not reachable.
        """
        folder = self.local(name)
        if folder is not None and folder.is_file():
            raise ModelLoadError(f"{name!r} is a file: name the folder that it lies in")
        if folder is not None:
            if revision is not None:
                raise ModelLoadError(f"{name!r} is a folder here and has no revision {revision!r}: leave revision= out")
            return folder.resolve()
        if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name:
            raise ModelLoadError(
                f"there is no folder {name!r} (looked in {Path.cwd()}), and it is no Hub id (owner/name); "
                f"the built-in model is called {BUILT_IN_MODEL!r}"
            )
        return _hub(name, revision, self.token, self.cache_folder, code, patterns)

    @staticmethod
    def local(name: str) -> Path | None:
        """The folder or file of that name here, if there is one."""
        path = _ASSETS / name if name == BUILT_IN_MODEL else Path(name).expanduser()
        return path if path.exists() else None


@lru_cache(maxsize=64)
def _hub(
    name: str,
    revision: str | None,
    token: str | None,
    cache_folder: str | None,
    code: bool,
    only: tuple[str, ...] | None,
) -> Path:
    """Download a repository of the Hub, or find it in the cache."""

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_folder,
                allow_patterns=patterns + (["*.py"] if code else []),
                ignore_patterns=None if only else _NOT_DOWNLOADED,
            )
        )

    try:
        folder = download(list(only or _DOWNLOADED))
        if not only and not any(folder.glob("*.safetensors")):
            folder = download([*_DOWNLOADED, "*.bin"])
    except Exception as error:  # the client's errors have no common base
        where = f"at revision {revision!r} " if revision else ""
        raise ModelLoadError(
            f"{name!r} is no folder here, and the Hugging Face Hub did not give it {where}"
            f"({type(error).__name__}: {' '.join(str(error).split())}). "
            f"Check the name (the built-in model is {BUILT_IN_MODEL!r}); without a network, download it first (hf "
            "download) or name a local folder; for a private or gated model pass token="
        ) from error
    return folder


@lru_cache(maxsize=64)
def _config(folder: Path, trust_remote_code: bool, stat: tuple[str, int, int]) -> Any:
    needs_code = not trust_remote_code and "auto_map" in _read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a configuration's own code raises
        raise ModelLoadError(
            f"config.json in {folder} cannot be used ({type(error).__name__}: {error}): "
            + (
                "it comes with Python code of its own: read that code, then pass trust_remote_code=True"
                if needs_code
                else "a newer transformers may know this kind of model"
            )
        ) from error
    if config.is_encoder_decoder:
        raise ModelLoadError(
            f"the model in {folder} ({config.model_type}) is an encoder-decoder, not a causal LM: "
            "choose a decoder-only model such as Qwen3, Llama or Mistral"
        )
    return config.get_text_config()


@lru_cache(maxsize=16)
def _tokenizer(folder: Path, trust_remote_code: bool, stats: tuple[tuple[str, int, int], ...]) -> TextTokenizer:
    if folder == (_ASSETS / BUILT_IN_MODEL).resolve():
        logger.warning(
            "%s is a demonstration model of 8 M parameters: for real use name another, such as model=%r",
            BUILT_IN_MODEL,
            "Qwen/Qwen3-0.6B",
        )
    return TextTokenizer.load(folder, trust_remote_code)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read ({error}): was its download finished?") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds no JSON object: was its download finished?")
    return content


@lru_cache(maxsize=1024)
def _hash_json(path: str, size: int, mtime_ns: int, without: frozenset[str]) -> str:
    """Hash of a JSON object's meaning, less some keys."""
    content = {key: value for key, value in _read_json(Path(path)).items() if key not in without}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stat(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def _hash_files(paths: Sequence[Path]) -> str:
    """Hash of the contents of files, in their order."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        hashes = list(pool.map(lambda path: _hash_file(*_stat(path)), paths))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@lru_cache(maxsize=1024)
def _hash_file(path: str, size: int, mtime_ns: int) -> str:
    blob = Path(path).resolve()
    if blob.parent.name == "blobs" and _BLOB_NAME.fullmatch(blob.name):
        return blob.name
    digest = hashlib.sha256()
    bar = tqdm(total=size, desc=f"fingerprint of {blob.name}", unit="B", unit_scale=True, delay=2, disable=None)
    with blob.open("rb") as file, bar:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _sample_weights(files: tuple[tuple[str, int, int], ...]) -> str:
    """Hash of the first few numbers of every tensor but the LM head's, in bfloat16, in the order of their names."""
    samples: dict[str, bytes] = {}
    for path, *_ in files:
        for name, values in _first_values(Path(path)):
            if "lm_head" not in name:
                samples[name] = values.float().bfloat16().view(torch.int16).numpy().tobytes()
    return hashlib.sha256(b"".join(samples[name] for name in sorted(samples))).hexdigest()


def _first_values(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    first = (slice(0, 1),) * (len(tensor.get_shape()) - 1) + (slice(0, 16),)
                    yield name, tensor[first].flatten() if tensor.get_shape() else file.get_tensor(name).reshape(1)
        else:
            for name, value in torch.load(path, map_location="cpu", mmap=True, weights_only=True).items():
                yield name, value[(0,) * (value.dim() - 1)][:16].flatten() if value.dim() else value.reshape(1)
    except Exception as error:  # safetensors' and unpickling errors have no common base
        raise ModelLoadError(
            f"{path} cannot be read ({type(error).__name__}: {error}): was its download finished?"
        ) from error
