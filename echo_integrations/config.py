"""Settings, enumerations and errors: the words that every other module uses.

This module knows nothing of tokenizers, models or frameworks and imports nothing from the package.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

BUILT_IN_MODEL = "echo-mini"


def canonical_json(value: Any) -> str:
    """One spelling for equal values; objects count by their ``to_dict()``, if they have one, or their repr.

    Example:
        >>> canonical_json({"b": 1, "a": 2})
        '{"a": 2, "b": 1}'
    """
    return json.dumps(value, sort_keys=True, default=lambda v: v.to_dict() if hasattr(v, "to_dict") else repr(v))


# what from_pretrained would take, and what says it here
_NO_MODEL_KWARGS = {
    **{name: f"pass {name}=" for name in ("attn_implementation", "revision", "token", "trust_remote_code")},
    **{name: "pass dtype=" for name in ("dtype", "torch_dtype")},
    "cache_dir": "pass cache_folder=",
    "device": "pass device=",
    "use_auth_token": "pass token=",
    "local_files_only": "files are found before they are loaded; set HF_HUB_OFFLINE=1 to stay offline",
    "weights_only": "pickled weights are never unpickled freely",
    "output_loading_info": "it is always asked for",
    **dict.fromkeys(
        ("gguf_file", "subfolder", "use_safetensors", "variant"),
        "the files of a model are found by their standard names; copy others into a folder of their own",
    ),
}


# what other embedding classes call it
_ELSEWHERE = {
    "batch_size": "token_budget",
    "encode_kwargs": "normalize_embeddings, token_budget or another argument by its own name",
    "max_seq_length": "max_length",
    "normalize": "normalize_embeddings",
    "prompt": "query_instruction or document_instruction",
    "text_instruction": "document_instruction",
}


class Mode(StrEnum):
    """How a text is laid out for the model."""

    ECHO = "echo"
    """The text stands in the prompt twice and the second copy is pooled (Springer et al., 2024)."""
    CLASSICAL = "classical"
    """The text stands in the prompt once: the baseline."""
    LLM2VEC_GEN = "llm2vec-gen"
    """Trained tokens follow the text; their hidden states stand for the answer (BehnamGhader et al., 2026)."""


class Pooling(StrEnum):
    """Which hidden states of the pooled span become the vector."""

    MEAN = "mean"
    """Their mean."""
    LAST = "last"
    """The last one."""


class OnTruncate(StrEnum):
    """What happens to a text of more than ``max_length`` tokens."""

    TRUNCATE = "truncate"
    """It is cut silently."""
    WARN = "warn"
    """It is cut and one `TruncationWarning` a call names the first such text."""
    ERROR = "error"
    """`TruncationError`, before anything is computed from that text."""


class Role(StrEnum):
    """The side of retrieval that a text stands on."""

    QUERY = "query"
    """What is asked."""
    DOCUMENT = "document"
    """What is searched."""


DEFAULT_INSTRUCTIONS: dict[Role, str] = {
    Role.QUERY: "Generate a passage that best answers this question:",
    Role.DOCUMENT: "Summarize the following passage:",
}
"""What the LLM2Vec-Gen paper asks of the model for each side of retrieval."""

# Checkpoints of the echo paper that were fine-tuned on a template pair of their own: name -> what they need.
# Templates, instruction and max_length are those of the example that was released with them.
_FINE_TUNED: dict[str, Any] = {
    "query_template": "fine-tuned-query",
    "document_template": "fine-tuned-document",
    "query_instruction": "Retrieve passages that answer the question",
    "max_length": 300,
}
RELEASED_CHECKPOINTS: dict[str, dict[str, Any]] = {
    "echo-mistral-7b-instruct-lasttoken": {**_FINE_TUNED, "pooling": Pooling.LAST},
    "echo-mistral-7b-instruct-meantoken": {**_FINE_TUNED, "pooling": Pooling.MEAN},
}

E = TypeVar("E", bound=StrEnum)


def _secret(value: SecretStr | str | None) -> SecretStr | None:
    return SecretStr(value) if isinstance(value, str) else value


def _one_of(enumeration: type[E]) -> AfterValidator:
    """Turns a word into the member that it names."""

    def member(word: str) -> E:
        if word not in list(enumeration):
            raise ValueError(f"{word!r} is not one of {', '.join(repr(str(m)) for m in enumeration)}")
        return enumeration(word)

    return AfterValidator(member)


class EchoIntegrationsError(Exception):
    """Base class of every error that this package raises on purpose."""


class ModelLoadError(EchoIntegrationsError):
    """A model, tokenizer or adapter cannot be found, read or used for embeddings."""


class TokenSetError(EchoIntegrationsError):
    """A token set is damaged, incomplete, or of a version or kind that cannot be used."""


class TokenSetMismatchError(TokenSetError):
    """A token set was trained on another backbone; the message names both."""


class InputError(EchoIntegrationsError, ValueError):
    """A text, instruction or argument cannot be encoded; the message names the item."""


class TemplateError(InputError):
    """A template is malformed; the message gives the position of the fault."""


class TruncationError(InputError):
    """A text is longer than ``max_length`` and ``on_truncate`` is ``"error"``."""


class EncodingError(EchoIntegrationsError):
    """The backbone gave numbers that are no embedding, or one text alone does not fit in memory."""


class FingerprintMismatchError(EchoIntegrationsError):
    """Two vector spaces were about to be mixed; the message names both fingerprints."""


class TruncationWarning(UserWarning):
    """A text was cut to ``max_length`` tokens."""


class EncoderSettings(BaseModel):
    """Every argument of `Encoder` and of the embedding classes, with its default.

    All arguments are keywords; unknown names are refused. Instances are immutable.

    Example:
        >>> EncoderSettings(model="echo-mini", mode="classical").max_length
        512
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,  # it may be a token
        populate_by_name=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    model_name: str = Field(default=BUILT_IN_MODEL, alias="model", min_length=1)
    """Hub id, local folder, or ``"echo-mini"``, the small model that comes with the package. Alias: ``model``."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    token: Annotated[SecretStr | str | None, AfterValidator(_secret)] = Field(default=None, exclude=True, repr=False)
    """Access token for the Hub; never shown, never saved."""
    cache_folder: str | None = None
    """Where Hub downloads are kept; the Hugging Face cache unless given."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    device: str | None = None
    """``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; the best one present unless given."""
    dtype: str = "auto"
    """``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: bfloat16 where the hardware multiplies it
    (GPUs, CPUs with AMX or AVX512-BF16), else float32."""
    attn_implementation: str | None = None
    """``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` ...; transformers' choice unless given."""
    compile: bool = False
    """Whether the model is compiled with torch.compile when it is first used: minutes once a process, quicker
    afterwards; ``benchmarks/README.md`` says how much."""
    adapter: str | None = None
    """A PEFT adapter (Hub id or folder) that is merged into the model when it is loaded."""
    mode: Annotated[Mode | str, _one_of(Mode)] = Mode.ECHO
    """``"echo"``, ``"classical"`` or ``"llm2vec-gen"``: how a text is laid out for the model."""
    token_set: str | None = None
    """Trained tokens for mode ``"llm2vec-gen"``: a folder or Hub id, in this package's format or a released one's.
    Not needed where ``model`` is itself a token set or a released checkpoint; where only this is given, the
    backbone that it was trained on is the model."""
    token_set_revision: str | None = None
    """Branch, tag or commit of the token set on the Hub; ``revision`` is the model's."""
    query_template: str | None = None
    """Preset name or template for queries; the mode's own unless given. See `echo_integrations.recipe`."""
    document_template: str | None = None
    """Preset name or template for documents; the mode's own unless given."""
    query_instruction: str | None = None
    """Fills ``%%prompt%%`` of the query template; ``""`` and None mean none. In mode ``"llm2vec-gen"`` it stands
    before a query, and None means the token set's own or else the paper's."""
    document_instruction: str | None = None
    """The same for documents."""
    pooling: Annotated[Pooling | str, _one_of(Pooling)] = Pooling.MEAN
    """``"mean"`` of the pooled tokens or the ``"last"`` one."""
    max_length: int = Field(default=512, ge=1, strict=True)
    """Tokens of a text that are used, per copy; clamped to what the backbone's positions allow. In mode
    ``"llm2vec-gen"`` instruction and trained tokens count, too."""
    on_truncate: Annotated[OnTruncate | str, _one_of(OnTruncate)] = OnTruncate.WARN
    """``"truncate"``, ``"warn"`` or ``"error"`` when a text is longer than that."""
    normalize_embeddings: bool = True
    """Whether vectors are scaled to length 1."""
    truncate_dim: int | None = Field(default=None, ge=1, strict=True)
    """Keep only the first so many components (before normalisation)."""
    token_budget: int | None = Field(default=None, ge=1, strict=True)
    """Tokens in one forward pass, padding included; chosen for the device unless given."""
    show_progress: bool | None = None
    """True: a progress bar; False: none; None: one on a terminal when a call takes over two seconds."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of ``AutoModel.from_pretrained``, such as ``quantization_config`` or ``device_map``."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        """Refuse a model that is named twice, and unknown names with the likeliest known one."""
        if not isinstance(data, Mapping):
            return data
        if "model" in data and "model_name" in data:
            raise ValueError("model and model_name are two names of one argument: give one of them")
        known = {*cls.model_fields, "model"}
        for name in data.keys() - known:
            close = _ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
            hint = f"did you mean {close}?" if close else f"there are {', '.join(sorted(known))}"
            raise ValueError(f"{name!r} is no argument: {hint}")
        return data

    @model_validator(mode="after")
    def _take_defaults_of_checkpoint(self) -> Self:
        """Give the released checkpoints what they were trained with, where nothing else was asked for."""
        trained_with = RELEASED_CHECKPOINTS.get(self.model_name.rstrip("/").rsplit("/", 1)[-1], {})
        if self.mode == Mode.ECHO:
            self.__dict__.update({k: v for k, v in trained_with.items() if k not in self.model_fields_set})
        if self.query_template != _FINE_TUNED["query_template"] and "query_instruction" not in self.model_fields_set:
            self.__dict__["query_instruction"] = None
        return self

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        """Refuse what the mode has no use for, rather than ignore it."""
        if self.token_set_revision is not None and self.token_set is None:
            raise ValueError("token_set_revision was given without token_set: of a model, give revision")
        if self.token_set is not None and self.revision is not None and "model_name" not in self.model_fields_set:
            raise ValueError("revision is the model's, and no model is named: name it, or give token_set_revision")
        if self.mode == Mode.LLM2VEC_GEN:
            names = ("query_template", "document_template", "pooling")
            useless = [name for name in names if getattr(self, name) != EncoderSettings.model_fields[name].default]
            if useless:
                raise ValueError(
                    f"{', '.join(useless)} cannot be chosen in mode 'llm2vec-gen': the token set says how a text is "
                    "laid out and pooled; give query_instruction and document_instruction instead of templates"
                )
        elif self.token_set is not None:
            raise ValueError(f"token_set belongs to mode='llm2vec-gen', the mode is {str(self.mode)!r}: give that mode")
        return self

    @field_validator("token_set", mode="before")
    @classmethod
    def _name_of_token_set(cls, value: Any) -> Any:
        """Accept a ``Path``."""
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("dtype", mode="before")
    @classmethod
    def _name_of_dtype(cls, value: Any) -> Any:
        """Accept ``torch.bfloat16`` for ``"bfloat16"``."""
        name = str(value).removeprefix("torch.")
        if name not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"{value!r} is not one of 'auto', 'float32', 'bfloat16', 'float16'")
        return name

    @field_validator("model_kwargs")
    @classmethod
    def _no_second_way_to_say_it(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, instead in _NO_MODEL_KWARGS.items():
            if name in value:
                raise ValueError(f"{name!r} has no place in model_kwargs: {instead}")
        return value

    @field_validator("device", mode="before")
    @classmethod
    def _name_of_device(cls, value: Any) -> Any:
        """Accept ``torch.device("cuda")`` for ``"cuda"``."""
        return None if value is None else str(value)

    @classmethod
    def setting_names(cls) -> frozenset[str]:
        """The names of all settings, with the alias ``model``."""
        return frozenset(EncoderSettings.model_fields) | {"model"}

    def settings(self) -> dict[str, Any]:
        """The settings that were given, by name, as `Encoder(**settings)` takes them, the token included.

        Example:
            >>> EncoderSettings(max_length=64).settings()
            {'max_length': 64}
        """
        return {name: getattr(self, name) for name in EncoderSettings.model_fields if name in self.model_fields_set}

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Model and mode, and what differs from the defaults."""
        for name, value in super().__repr_args__():
            field = EncoderSettings.model_fields.get(name or "")
            if field and (name in ("model_name", "mode") or value != field.get_default(call_default_factory=True)):
                yield name, value.value if isinstance(value, StrEnum) else value

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, validated like a new one.

        Example:
            >>> EncoderSettings().replace(mode="classical").mode.value
            'classical'
        """
        if "model" in changes:
            changes["model_name"] = changes.pop("model")
        return type(self)(**{**self._arguments(), **changes})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As `replace`: pydantic's own would neither validate a change nor tell those who hold a setting."""
        return self.replace(**(update or {}))

    def _arguments(self) -> dict[str, Any]:
        """What a new instance like this one is made with."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
