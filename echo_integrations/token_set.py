"""`TokenSet`: the trained part of LLM2Vec-Gen, apart from the backbone: loaded, verified, saved.

A token set is M embedding rows that follow a text, of which the hidden states of the last N are read, and two linear
maps. On disk it is a folder of ``token_set.json``, ``tokens.safetensors`` and a model card, and of
``adapter.safetensors`` where the backbone is adapted, too. The released checkpoints' layout is read as well
(`echo_integrations.released`). This module never runs a model.

Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from echo_integrations import released
from echo_integrations.checkpoint import Checkpoint, Place
from echo_integrations.config import EncoderSettings, InputError, Role, TokenSetError, TokenSetMismatchError

HEADER = "token_set.json"
FORMAT_VERSION = 1
_OWN_FILES = (HEADER, "tokens.safetensors", "adapter.safetensors", "vocabulary.json")
FILES = (*_OWN_FILES, *released.FILES)
"""What there is to download of a token set in either layout."""

_OWN_NAMES = {pattern.split("/")[0] for pattern in FILES}
_NO_PART_OF_LORA = {"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_version"}
_NO_PART_OF_LORA |= {"revision", "task_type"}
_MAPS = ("reconstruction.weight", "reconstruction.bias", "alignment.weight", "alignment.bias")


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenSet:
    """Trained tokens and their two linear maps; immutable, shared between threads, compared by identity.

    Attributes:
        rows: (M, H) float32 embedding rows of the thought tokens and, after them, the compression tokens.
        maps: ``reconstruction.weight`` (H, H), ``reconstruction.bias`` (H,), ``alignment.weight`` (D, H) and
            ``alignment.bias`` (D,), float32.
        compression: N, how many of the rows are read, the last ones.
        backbone: name of the backbone that it was trained on.
        revision: its commit on the Hub, if known.
        backbone_identity: `Checkpoint.identity` of the backbone; empty for a released checkpoint, which has none.
        special_tokens: the M names that the tokens have in the released layout.
        instructions: what stands before queries and documents unless the user says otherwise; may lack a role.
        teacher: name of the embedder that it was aligned with.
        training: how it was trained, JSON-able.
        lora_config: PEFT configuration of an adapter of the backbone that belongs to the set, or None.
        lora: the adapter's tensors by PEFT's names.
        vocabulary: of the tokenizer that came with a released checkpoint, less the trained tokens; else empty.

    Raises:
        TokenSetError: tensors that do not fit together, or that hold NaN or infinity.

    Example:
        >>> import torch
        >>> maps = {"reconstruction.weight": torch.eye(8), "reconstruction.bias": torch.zeros(8)}
        >>> maps |= {"alignment.weight": torch.ones(3, 8), "alignment.bias": torch.zeros(3)}
        >>> tokens = TokenSet(rows=torch.randn(4, 8), maps=maps, compression=2, backbone="echo-mini")
        >>> tokens.hidden_size, tokens.dimension, tokens.special_tokens[-1]
        (8, 3, '<compress_1>')
    """

    rows: Tensor
    maps: Mapping[str, Tensor]
    compression: int
    backbone: str
    revision: str | None = None
    backbone_identity: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: tuple[str, ...] = ()
    instructions: Mapping[Role, str] = field(default_factory=dict)
    teacher: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    lora_config: Mapping[str, Any] | None = None
    lora: Mapping[str, Tensor] = field(default_factory=dict)
    vocabulary: Mapping[str, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.rows.dim() != 2 or set(self.maps) != set(_MAPS):
            raise TokenSetError(f"a token set has rows (M, H) and {', '.join(_MAPS)}; here are {self._shapes()}")
        hidden, dimension = self.hidden_size, len(self.maps["alignment.bias"])
        expected = [(hidden, hidden), (hidden,), (dimension, hidden), (dimension,)]
        if [tuple(self.maps[name].shape) for name in _MAPS] != expected:
            raise TokenSetError(f"the tensors of the token set do not fit together: {self._shapes()}")
        if not 1 <= self.compression <= len(self.rows):
            raise TokenSetError(f"{self.compression} of {len(self.rows)} trained tokens cannot be read")
        for name, tensor in self._tensors().items():
            if not tensor.isfinite().all():
                raise TokenSetError(f"{name} of the token set holds NaN or infinity: the training went wrong")
        if not self.special_tokens:
            thought = len(self.rows) - self.compression
            names = [f"<thought_{i}>" for i in range(thought)] + [f"<compress_{i}>" for i in range(self.compression)]
            object.__setattr__(self, "special_tokens", tuple(names))
        if len(set(self.special_tokens)) != len(self.rows):
            raise TokenSetError(f"{len(self.rows)} tokens have the names {', '.join(self.special_tokens)}")

    @property
    def hidden_size(self) -> int:
        """H, components of a hidden state of the backbone."""
        return int(self.rows.shape[1])

    @property
    def dimension(self) -> int:
        """D, components of an embedding."""
        return int(self.maps["alignment.weight"].shape[0])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what makes the vectors: tensors and how many tokens are read."""
        digest = hashlib.sha256(str(self.compression).encode())
        for name, tensor in sorted({**self._tensors(), **self.lora}.items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().contiguous().numpy().tobytes())
        if self.lora_config is not None:
            config = {key: value for key, value in self.lora_config.items() if key not in _NO_PART_OF_LORA}
            digest.update(json.dumps(config, sort_keys=True, default=_plain).encode())
        return digest.hexdigest()

    @staticmethod
    def load(
        name: str | Path, *, revision: str | None = None, token: str | None = None, cache_folder: str | None = None
    ) -> TokenSet:
        """Load a token set: a folder or Hub id, in this package's format or the released one.

        Args:
            name: folder or Hub id.
            revision: branch, tag or commit on the Hub.
            token: access token for the Hub.
            cache_folder: where Hub downloads are kept.

        Returns:
            The token set; the same object again while its files do not change.

        Raises:
            ModelLoadError: nothing there, or not reachable.
            TokenSetError: damaged, incomplete, of a future version, or no token set.
        """
        folder = Place(token, cache_folder).find(str(name), revision, patterns=FILES)
        patterns = _OWN_FILES if (folder / HEADER).is_file() else released.FILES
        paths = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
        return _load(folder, tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths))

    def check(self, checkpoint: Checkpoint) -> None:
        """See that a backbone is the one that the set was trained on.

        Raises:
            TokenSetMismatchError: it is not; the message names both and what differs.
        """
        key = (checkpoint, checkpoint.signature)
        if key not in self._fitting:
            different = self._differences(checkpoint)
            if different:
                raise TokenSetMismatchError(
                    f"the token set was trained on {self.backbone!r}"
                    + (f" (revision {self.revision})" if self.revision else "")
                    + f", the model is {checkpoint.name!r}: they differ in {', '.join(different)}; "
                    "use it with its own backbone, or train one for this model"
                )
            self._fitting.add(key)

    @cached_property
    def _fitting(self) -> set[Any]:
        """Checkpoints that were seen to fit."""
        return set()

    def _differences(self, checkpoint: Checkpoint) -> list[str]:
        identity = checkpoint.identity()
        different = []
        if self.hidden_size != identity["hidden_size"]:
            different.append(f"hidden size ({self.hidden_size} there, {identity['hidden_size']} here)")
        if self.backbone_identity:
            keys = (self.backbone_identity.keys() | identity.keys()) - {"hidden_size"}
            different += sorted(key for key in keys if self.backbone_identity.get(key) != identity.get(key))
        elif not checkpoint.tokenizer.vocabulary().items() <= self.vocabulary.items():
            different.append("vocabulary")
        return different

    def save(self, path: str | Path) -> None:
        """Write the set into a folder, whole or not at all.

        Args:
            path: a new folder, an empty one, or one that holds a token set, which is replaced.

        Raises:
            InputError: something else is there.
            OSError: it cannot be written, such as on a full disk; what was there stays.
        """
        _write_folder(Path(path), HEADER, self._write)

    def push_to_hub(
        self, repo_id: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
    ) -> str:
        """Upload the set to the Hub, creating the repository at need.

        Args:
            repo_id: ``owner/name``.
            token: access token with the right to write; the logged-in user's unless given.
            private: whether a new repository is private; the account's default unless given.
            revision: branch.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder))
            message = "Upload token set"
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
        return str(commit)

    def export_released(self, path: str | Path, *, model: str | None = None, **place: Any) -> None:
        """Write the set in the layout of the released checkpoints, whole or not at all.

        Args:
            path: a new folder, an empty one, or one that holds such a checkpoint, which is replaced.
            model: the backbone, for its tokenizer and configuration; the recorded one unless given.
            **place: ``revision``, ``token`` and ``cache_folder`` for a backbone on the Hub.

        Raises:
            InputError: something else is there.
            TokenSetMismatchError: the backbone is not the set's.
            TokenSetError: the backbone's tokenizer has tokens of those names.
        """
        checkpoint = Checkpoint.find(EncoderSettings(model=model or self.backbone, **place))
        self.check(checkpoint)
        contents = released.Contents(
            model or self.backbone,
            self.special_tokens,
            self.compression,
            self.rows,
            self.maps,
            self.lora_config,
            self.lora,
            {},
        )
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.folder), local_files_only=True)
        config = AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
        _write_folder(Path(path), released.RUN_CONFIG, lambda f: released.write(f, contents, tokenizer, config))

    def _tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows, **self.maps}

    def _shapes(self) -> str:
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self._tensors().items())

    def _write(self, folder: Path) -> None:
        # written as bytes: save_file would let nobody else read the file
        tensors = {name: tensor.float().contiguous() for name, tensor in self._tensors().items()}
        (folder / "tokens.safetensors").write_bytes(save(tensors))
        if self.lora:
            lora = {name: tensor.contiguous() for name, tensor in self.lora.items()}
            (folder / "adapter.safetensors").write_bytes(save(lora))
        if self.vocabulary:
            (folder / "vocabulary.json").write_text(json.dumps(dict(self.vocabulary)), "utf-8")
        header = {
            "format_version": FORMAT_VERSION,
            "backbone": {"name": self.backbone, "revision": self.revision, "identity": dict(self.backbone_identity)},
            "thought_tokens": len(self.rows) - self.compression,
            "compression_tokens": self.compression,
            "special_tokens": list(self.special_tokens),
            "hidden_size": self.hidden_size,
            "dimension": self.dimension,
            "instructions": {str(role): text for role, text in self.instructions.items()},
            "teacher": self.teacher,
            "training": dict(self.training),
            "lora": self.lora_config and dict(self.lora_config),
            "sha256": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
        }
        header = json.loads(json.dumps(header, default=_plain))
        header["checksum"] = _checksum(header)
        (folder / HEADER).write_text(json.dumps(header, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (folder / "README.md").write_text(_model_card(self), "utf-8")


def is_token_set(folder: Path) -> bool:
    """Whether a folder is a token set in either layout."""
    return (folder / HEADER).is_file() or released.is_released(folder)


def count_tokens(folder: Path) -> int:
    """M of a token set, known without reading its tensors.

    Raises:
        TokenSetError: no token set, or its header cannot be read.
    """
    if _is_own(folder):
        return len(_read_header(folder)["special_tokens"])
    return len(released.read_header(folder)[1])


def _is_own(folder: Path) -> bool:
    """Whether a token set is in this package's format rather than the released one.

    Raises:
        TokenSetError: it is no token set at all.
    """
    if not is_token_set(folder):
        raise TokenSetError(f"{folder} holds no token set (neither {HEADER} nor {released.RUN_CONFIG})")
    return (folder / HEADER).is_file()


@lru_cache(maxsize=128)
def _load(folder: Path, stats: tuple[tuple[str, int, int], ...]) -> TokenSet:
    if _is_own(folder):
        return _read(folder)
    contents = released.read(folder)
    return TokenSet(
        rows=contents.rows,
        maps=contents.maps,
        compression=contents.compression,
        backbone=contents.model_name,
        special_tokens=contents.special_tokens,
        lora_config=contents.lora_config,
        lora=contents.lora,
        vocabulary=contents.vocabulary,
    )


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        version = header["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenSetError(f"{path} cannot be read ({type(error).__name__}: {error}): copy it again") from error
    if version != FORMAT_VERSION:
        raise TokenSetError(
            f"{path} is of format version {version}, this version of echo-integrations reads {FORMAT_VERSION}: upgrade "
            'it (pip install -U "echo-integrations")'
        )
    if header.get("checksum") != _checksum(header):
        raise TokenSetError(
            f"{path} is damaged or was edited: its checksum does not fit; copy it again, or change a set by loading "
            "it, dataclasses.replace and save"
        )
    return dict(header)


def _checksum(header: Mapping[str, Any]) -> str:
    """Of everything in a header but itself."""
    content = {key: value for key, value in header.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> TokenSet:
    """Read this package's own format, every byte verified."""
    header = _read_header(folder)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, sha256 in header["sha256"].items():
        path = folder / name
        if not path.is_file() or Path(name).name != name:
            raise TokenSetError(f"{folder} lacks {name}: copy it again")
        if _sha256(path) != sha256:
            raise TokenSetError(f"{path} is damaged: its SHA-256 is not the one in {HEADER}; copy it again")
        if path.suffix == ".safetensors":
            tensors[name] = load_file(path)
    if "tokens.safetensors" not in tensors or (header.get("lora") and "adapter.safetensors" not in tensors):
        raise TokenSetError(f"{folder / HEADER} does not list all files of the set: copy it again")
    maps = tensors["tokens.safetensors"]
    if "rows" not in maps:
        raise TokenSetError(f"{folder / 'tokens.safetensors'} holds no rows: copy it again")
    backbone = header["backbone"]
    return TokenSet(
        rows=maps.pop("rows"),
        maps=maps,
        compression=header["compression_tokens"],
        backbone=backbone["name"],
        revision=backbone.get("revision"),
        backbone_identity=backbone.get("identity", {}),
        special_tokens=tuple(header["special_tokens"]),
        instructions={Role(role): text for role, text in header.get("instructions", {}).items()},
        teacher=header.get("teacher"),
        training=header.get("training", {}),
        lora_config=header.get("lora"),
        lora=tensors.get("adapter.safetensors", {}),
        vocabulary=json.loads((folder / "vocabulary.json").read_text("utf-8"))
        if "vocabulary.json" in header["sha256"]
        else {},
    )


def _write_folder(path: Path, mark: str, write: Callable[[Path], None]) -> None:
    """Make a folder beside its place and move it there; one that ``mark`` shows to be of the same kind is replaced.

    What else lies in the folder that is replaced, such as a report, stays.
    """
    if path.exists() and not (path.is_dir() and ((path / mark).is_file() or not any(path.iterdir()))):
        raise InputError(f"{path} holds something else than {mark} and its files: choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    fresh, old = work / "new", work / "old"
    try:
        fresh.mkdir()
        write(fresh)
        for other in path.iterdir() if path.exists() else ():
            if other.name not in _OWN_NAMES and not (fresh / other.name).exists():
                copy = shutil.copytree if other.is_dir() else shutil.copy2
                copy(other, fresh / other.name)
        try:
            if path.exists():
                path.rename(old)
            fresh.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    finally:
        if path.exists() or not old.exists():  # else the old one is in there, the only one
            shutil.rmtree(work)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """What JSON says of a value that it has no word for, such as the sets of a PEFT configuration."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _model_card(tokens: TokenSet) -> str:
    lines = ["---", "library_name: echo-integrations", "pipeline_tag: feature-extraction"]
    lines += [f"base_model: {tokens.backbone}"] if tokens.backbone.count("/") == 1 else []
    lines += ["tags: [llm2vec-gen, embeddings]", "---", "", f"# Token set for {tokens.backbone}", ""]
    lines += [
        f"{len(tokens.rows) - tokens.compression} thought and {tokens.compression} compression tokens for LLM2Vec-Gen "
        f"embeddings of {tokens.dimension} components (BehnamGhader et al., arXiv 2603.10913), trained on "
        f"`{tokens.backbone}`" + (f", aligned with `{tokens.teacher}`" if tokens.teacher else "") + ".",
        "",
        "```python",
        "from echo_integrations.langchain import LLM2VecGenEmbeddings",
        "",
        f'embeddings = LLM2VecGenEmbeddings(model="{tokens.backbone}", token_set="THIS FOLDER OR HUB ID")',
        "```",
    ]
    for role, text in tokens.instructions.items():
        lines += ["", f"Instruction for a {role}: `{text}`"]
    if tokens.training:
        lines += ["", "## Training", "", "```json", json.dumps(tokens.training, indent=2, default=_plain), "```"]
    return "\n".join(lines) + "\n"
