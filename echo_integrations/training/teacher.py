"""Teachers: embedders of any framework whose vectors are the target, and the store in which these are kept.

This module knows nothing of training.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from echo_integrations.adapter import EncoderFields
from echo_integrations.config import EncodingError, FingerprintMismatchError, InputError, canonical_json
from echo_integrations.encoder import Encoder
from echo_integrations.files import FileError
from echo_integrations.texts import checked
from echo_integrations.training.journal import Journal, write_atomically

Vectors = NDArray[np.float32]

_OWN = ("echo", "classical")  # modes of this package that need no training
_OPERATIONAL = {  # fields of embedding classes that do not change a vector
    *("async_client", "batch_size", "cache_dir", "cache_folder", "callback_manager", "chunk_size", "client", "device"),
    *("embed_batch_size", "max_concurrency", "max_retries", "multi_process", "num_workers", "parallel_process"),
    *("rate_limiter", "request_timeout", "retry_max_seconds", "retry_min_seconds", "show_progress"),
    *("show_progress_bar", "target_devices", "timeout", "verbose"),
}
_SECRETS = ("key", "token", "secret", "password", "credential", "header")
_SAMPLE = 64  # numbers of each tensor that tell one model from another


class Teacher(Protocol):
    """An embedder whose vectors are the target of training.

    Attributes:
        name: what people call it.
        fingerprint: what tells its vector space from others, the same in every process.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    def embed(self, texts: list[str]) -> Vectors:
        """(n, D) float32 vectors, scaled as the embedder scales them."""
        ...


@dataclass(frozen=True)
class _Wrapped:
    """An embedder of some framework as a `Teacher`."""

    name: str
    fingerprint: str
    function: Callable[[list[str]], Any]

    def embed(self, texts: list[str]) -> Vectors:
        return np.asarray(self.function(texts), dtype=np.float32)


def as_teacher(embedder: Any, *, name: str | None = None, fingerprint: str | None = None) -> Teacher:
    """Make a teacher of an embedder, which embeds responses as the documents that they are.

    Args:
        embedder: a folder or Hub id of sentence-transformers; ``"echo:MODEL"`` or ``"classical:MODEL"`` for this
            package's own encoder; an `Encoder` or an embedding class of this package; any LangChain ``Embeddings``,
            LlamaIndex ``BaseEmbedding`` or ``SentenceTransformer``; an object that is a `Teacher` already.
        name: in place of the one that the embedder seems to have.
        fingerprint: in place of the one that is made of the weights or, where there are none to see, of the class
            and its settings. Give it where these do not tell one model from another.

    Raises:
        InputError: nothing that embeds.
        ModuleNotFoundError: sentence-transformers is needed and not installed.

    Example:
        >>> teacher = as_teacher("echo:echo-mini")
        >>> teacher.name, teacher.embed(["Hold the green button."]).shape
        ('echo:echo-mini', (1, 256))
    """
    if isinstance(embedder, str):
        mode, _, model = embedder.partition(":")
        name = name or _shown(embedder)
        embedder = Encoder(model=model, mode=mode) if model and mode in _OWN else _sentence_transformer(embedder)
    if isinstance(embedder, Encoder | EncoderFields):
        encoder = embedder if isinstance(embedder, Encoder) else embedder.encoder
        own_name = f"{encoder.mode}:{encoder.token_set or encoder.model_name}"
        return _Wrapped(name or own_name, fingerprint or encoder.fingerprint, encoder.encode_document)
    library = sys.modules.get("sentence_transformers")
    if library is not None and isinstance(embedder, library.SentenceTransformer):
        config = getattr(getattr(embedder[0], "auto_model", None), "config", None)
        model_name = getattr(config, "_name_or_path", None) or "a SentenceTransformer"
        return _Wrapped(
            name or _shown(model_name), fingerprint or _fingerprint_of_weights(embedder), _encode_with(embedder)
        )
    embed = getattr(embedder, "embed_documents", None) or getattr(embedder, "get_text_embedding_batch", None)
    if embed is not None:
        space = {"class": _class_name(embedder), "settings": _settings_of(embedder)}
        digest = hashlib.sha256(canonical_json(space).encode()).hexdigest()[:32]
        return _Wrapped(name or _name_of(embedder), fingerprint or digest, embed)
    if callable(getattr(embedder, "embed", None)) and hasattr(embedder, "name") and hasattr(embedder, "fingerprint"):
        own: Teacher = embedder
        if name is None and fingerprint is None:
            return own
        return _Wrapped(name or own.name, fingerprint or own.fingerprint, own.embed)
    raise InputError(
        f"{type(embedder).__name__} is no teacher: give a LangChain or LlamaIndex embedding class, a "
        "SentenceTransformer or its name, an Encoder, or an object with name, fingerprint and embed(texts)"
    )


def _shown(name: str) -> str:
    """A Hub id as it is; of a folder its last two names, because what is trained may be shown to others."""
    folder = Path(name).expanduser()
    return "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else name


def _sentence_transformer(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'the teacher {name!r} needs sentence-transformers: pip install "echo-integrations[train]"'
        ) from error
    try:
        return SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the teacher {name!r} is no sentence-transformers model here or on the Hub ({error}): name another, "
            "or 'echo:MODEL' for this package's own encoder"
        ) from error


def _encode_with(model: Any) -> Callable[[list[str]], Any]:
    """Sentence-transformers' way with documents, if it knows one."""
    encode = getattr(model, "encode_document", model.encode)
    return lambda texts: encode(texts, convert_to_numpy=True, show_progress_bar=False)


def _fingerprint_of_weights(model: Any) -> str:
    """Of a SentenceTransformer: its modules and prompts, and a few numbers of every tensor, rounded to bfloat16."""
    import torch

    about = {
        "modules": [type(module).__name__ for module in model],
        "prompts": model.prompts,
        "default_prompt": model.default_prompt_name,
        "max_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "settings": [module.get_config_dict() for module in model if hasattr(module, "get_config_dict")],
    }
    digest = hashlib.sha256(canonical_json(about).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(flat.numel() - 1, 0), min(_SAMPLE, flat.numel()), device=flat.device).long()
        numbers = flat[places].to(torch.bfloat16).view(torch.int16).cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + numbers.tobytes())
    return digest.hexdigest()[:32]


def _name_of(embedder: Any) -> str:
    for attribute in ("model_name", "model", "model_id", "deployment", "repo_id"):
        value = getattr(embedder, attribute, None)
        if isinstance(value, str) and value:
            return value
    return _class_name(embedder)


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _settings_of(embedder: Any) -> dict[str, Any]:
    """What an object says of itself in plain values, less secrets and what does not change a vector."""
    names = getattr(type(embedder), "model_fields", None) or vars(embedder)
    settings = {}
    for name in names:
        secret = any(word in name.lower() for word in _SECRETS)
        value = getattr(embedder, name, None)
        if not secret and name not in _OPERATIONAL and not name.startswith("_") and _is_plain(value):
            settings[name] = value
    return settings


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


_FORMAT = "echo-integrations teacher vectors 1"
_PROBE = "Every store of vectors begins with the vector of this sentence."
_TOLERANCE = 0.99  # cosine of two embeddings of one text by one teacher, whatever its device and dtype
_RECORD = struct.Struct("<16sI")  # hash of the text, checksum of its vector
_BATCH = 256  # texts whose vectors reach the disk together


class TeacherVectors:
    """A teacher's vectors of texts, each computed once, on disk and memory-mapped, shared by runs and processes.

    The folder holds ``teacher.json``, ``vectors`` (float32, one row a text) and ``index`` (for each row the hash of
    its text and a checksum). Both grow at their end only, the vectors first: whatever ends a process, a row that is
    found is whole, and at most the last batch is lost. Processes that add at the same time take turns.

    Args:
        teacher: whose vectors they are.
        folder: made if it is not there.

    Attributes:
        dimension: components of a vector.

    Raises:
        FingerprintMismatchError: the folder holds vectors of another teacher or dimension.
        FileError: the folder cannot be used.

    Example:
        >>> import tempfile
        >>> vectors = TeacherVectors(as_teacher("classical:echo-mini"), Path(tempfile.mkdtemp()))
        >>> vectors.add(["Hold the green button.", "Turn it off."])
        >>> vectors[["Turn it off."]].shape
        (1, 256)
    """

    def __init__(self, teacher: Teacher, folder: Path) -> None:
        self._teacher, self._folder = teacher, Path(folder)
        self._rows: dict[bytes, tuple[int, int]] = {}  # hash of a text -> row, checksum
        self._count = 0
        self._map: Vectors | None = None
        probe = self._embed([_PROBE])
        self.dimension: int = probe.shape[1]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise FileError(f"{self._folder} is a file: choose a folder for the teacher's vectors") from error
        self._open()
        if _PROBE not in self:
            self._append([_PROBE], probe)
        cosine = _cosine(self[[_PROBE]][0], probe[0])
        if cosine < _TOLERANCE:
            raise FingerprintMismatchError(
                f"{self._folder} holds vectors of {teacher.name} (fingerprint {teacher.fingerprint}), which now gives "
                f"others (cosine {cosine:.3f} for the same text): choose another folder, and where its settings do "
                "not tell two models apart pass as_teacher(..., fingerprint=...)"
            )

    def __len__(self) -> int:
        """Texts whose vectors are there."""
        self._refresh()
        return len(self._rows) - (_key(_PROBE) in self._rows)

    def __contains__(self, text: str) -> bool:
        self._refresh()
        return _key(text) in self._rows

    def add(self, texts: Sequence[str]) -> None:
        """Compute what is not there yet; a progress bar is shown on terminals after two seconds.

        Raises:
            InputError: something that is no text.
            EncodingError: the teacher gave NaN, or vectors of another shape.
        """
        missing = self._missing(dict.fromkeys(checked(texts)))
        missing.sort(key=len, reverse=True)
        with tqdm(total=len(missing), desc="teacher", unit="text", disable=None, delay=2) as bar:
            for start in range(0, len(missing), _BATCH):
                batch = missing[start : start + _BATCH]
                self._append(batch, None)
                bar.update(len(batch))

    def __getitem__(self, texts: Sequence[str]) -> Vectors:
        """(n, D) float32 vectors of texts that were added.

        Raises:
            InputError: a text that was not.
            FileError: a vector is damaged.
        """
        listed = list(checked(texts))
        if missing := self._missing(listed):
            raise InputError(f"there is no vector of {missing[0][:60]!r}: add it first")
        result = np.empty((len(listed), self.dimension), dtype=np.float32)
        for place, text in enumerate(listed):
            row, checksum = self._rows[_key(text)]
            vector = self._mapped(row)[row]
            if zlib.crc32(vector.tobytes()) != checksum:
                raise FileError(f"{self._folder}, row {row}: the vector is damaged; delete the folder to compute anew")
            result[place] = vector
        return result

    def _open(self) -> None:
        """Say in a new folder whose it is, or see in an old one that it is the same teacher's."""
        header = {
            "format": _FORMAT,
            "teacher": self._teacher.name,
            "fingerprint": self._teacher.fingerprint,
            "dimension": self.dimension,
        }
        path = self._folder / "teacher.json"
        with Journal(self._folder / "index", wait=True) as index:
            if not path.exists():
                if index.size:
                    raise FileError(f"{self._folder} holds vectors but no teacher.json: choose or make another folder")
                write_atomically(path, json.dumps(header, indent=2) + "\n")
            found = _read_header(path)
        if (found["fingerprint"], found["dimension"]) != (header["fingerprint"], header["dimension"]):
            theirs, ours = (
                f"{h['teacher']} ({h['dimension']} components, fingerprint {h['fingerprint']})" for h in (found, header)
            )
            raise FingerprintMismatchError(
                f"{self._folder} holds vectors of {theirs}, the teacher is now {ours}: choose another folder"
            )

    def _append(self, texts: list[str], vectors: Vectors | None) -> None:
        """Write the vectors of those texts that no other process has written meanwhile."""
        size = 4 * self.dimension
        with Journal(self._folder / "index", wait=True) as index, Journal(self._folder / "vectors") as data:
            count = min(index.size // _RECORD.size, data.size // size)  # what is not whole was never seen
            index.truncate(count * _RECORD.size)
            data.truncate(count * size)
            if not (missing := self._missing(texts)):
                return
            new = self._embed(missing) if vectors is None else vectors
            data.append(new.tobytes(), sync=True)
            records = (_RECORD.pack(_key(t), zlib.crc32(v.tobytes())) for t, v in zip(missing, new, strict=True))
            index.append(b"".join(records), sync=True)
        self._refresh()

    def _embed(self, texts: list[str]) -> Vectors:
        vectors = np.ascontiguousarray(self._teacher.embed(texts), dtype="<f4")
        expected = (len(texts), getattr(self, "dimension", vectors.shape[-1] if vectors.ndim == 2 else -1))
        if vectors.shape != expected or 0 in vectors.shape:
            raise EncodingError(
                f"{self._teacher.name} gave an array of shape {vectors.shape} for {len(texts)} texts, not "
                f"({len(texts)}, {expected[1] if expected[1] > 0 else 'D'}): it is no embedder that can be a teacher"
            )
        bad = ~np.isfinite(vectors).all(axis=1)
        if bad.any():
            text = texts[int(np.argmax(bad))]
            raise EncodingError(f"{self._teacher.name} gave NaN or infinity for {text[:60]!r}: leave that text out")
        return vectors

    def _missing(self, texts: Iterable[str]) -> list[str]:
        missing = [text for text in texts if _key(text) not in self._rows]
        if missing:
            self._refresh()
        return [text for text in missing if _key(text) not in self._rows]

    def _refresh(self) -> None:
        """Take in rows that were written since, by whomever."""
        index, data = self._folder / "index", self._folder / "vectors"
        if not data.exists():
            return
        with index.open("rb") as file:
            file.seek(self._count * _RECORD.size)
            records = file.read()
        count = min(len(records) // _RECORD.size, data.stat().st_size // (4 * self.dimension) - self._count)
        for key, checksum in _RECORD.iter_unpack(records[: max(0, count) * _RECORD.size]):
            self._rows[key] = (self._count, checksum)
            self._count += 1

    def _mapped(self, row: int) -> Vectors:
        """The rows on disk, mapped anew when there are more."""
        if self._map is None or row >= len(self._map):
            shape = (self._count, self.dimension)
            self._map = np.memmap(self._folder / "vectors", dtype="<f4", mode="r", shape=shape)
        return self._map


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def _cosine(a: Vectors, b: Vectors) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else float(np.array_equal(a, b))


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_bytes())
        if header["format"] == _FORMAT and isinstance(header["dimension"], int):
            return dict(header)
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is damaged ({error}): choose another folder, or delete this one") from error
    raise FileError(f"{path} is of another version ({header['format']!r}): choose another folder")
