"""`EchoEmbeddingFunction` and `LLM2VecGenEmbeddingFunction`: the encoder as Chroma embedding functions.

Chroma writes a function's configuration into the database and builds the function from it again, anew for every
query, wherever this module has been imported; it never compares what it built with what the vectors came from. So
the configuration carries the fingerprint, a function checks it at its first call, and `open_collection` compares.
This module knows nothing of the other frameworks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict

from echo_integrations.adapter import ECHO_MODES, TOKEN_SET_MODES, EncoderFields, instructions
from echo_integrations.config import BUILT_IN_MODEL, FingerprintMismatchError, InputError, Role, canonical_json
from echo_integrations.encoder import Encoder
from echo_integrations.resolve import resolve

try:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection
    from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
    from chromadb.utils.embedding_functions import register_embedding_function
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('Chroma is not installed: pip install "echo-integrations[chroma]"') from error

_RECORDED = (
    "model_name revision adapter mode query_template document_template query_instruction document_instruction "
    "pooling max_length normalize_embeddings truncate_dim model_kwargs"
).split()
_RECORDED_OF_TOKEN_SETS = ["token_set", "token_set_revision"]
_PLACES = {"model_name", "revision", "adapter", *_RECORDED_OF_TOKEN_SETS}  # of what the fingerprint covers by content
_FIXED = {"fingerprint", *_RECORDED} - _PLACES - {"query_instruction"}
_HARMLESS_KWARGS = {"quantization_config"}  # others, such as weights_only, can make a model run code


class _Function:
    """What both classes do."""

    _fields: ClassVar[type[EncoderFields]]

    def __init__(self, *, encoder: Encoder | None = None, **settings: Any) -> None:
        given: dict[str, Any] = {} if encoder is None else {"encoder": encoder}
        self._encoder: Encoder | None = self._fields(**settings, **given).encoder
        self._config = _record(self._encoder)
        self._checked = False

    def __call__(self, input: Documents) -> Embeddings:
        """Embed texts that are searched.

        Args:
            input: strings; one string alone is one text.

        Returns:
            A list of (D,) float32 arrays, in order.

        Raises:
            InputError: an item that is no text; the message gives its index.
            ValueError: no texts at all, which Chroma refuses.
            FingerprintMismatchError: the model is no longer the one that the collection was made with.
        """
        return list(self._checked_encoder().encode_document([input] if isinstance(input, str) else input))

    def embed_query(self, input: Documents) -> Embeddings:
        """Embed questions; as ``__call__``, with the query template, and ``[]`` for ``[]``."""
        return list(self._checked_encoder().encode_query([input] if isinstance(input, str) else input))

    @property
    def encoder(self) -> Encoder:
        """The encoder behind it.

        Raises:
            InputError: Chroma built this function from a record that only a newer version, or only you, may use.
        """
        if self._encoder is None:
            if kwargs := sorted(self._config.get("model_kwargs", {}).keys() - _HARMLESS_KWARGS):
                raise InputError(
                    f"the collection was made with model_kwargs {', '.join(kwargs)}, which are not taken from a "
                    "database because they can run code: open it with open_collection and a function of your own"
                )
            self.validate_config(self._config)
            self._encoder = self._fields(**_without_fingerprint(self._config)).encoder
        return self._encoder

    @property
    def fingerprint(self) -> str:
        """Name of the vector space; see `Encoder.fingerprint`."""
        return self.encoder.fingerprint

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return self.encoder.dimension

    def with_instruction(self, query: str | None = None, *, document: str | None = None) -> Self:
        """A function with other instructions; it shares the loaded model.

        Args:
            query: stands before queries; ``""`` for none, None to keep what there is.
            document: the same for documents: another vector space, for a collection of its own.

        Raises:
            pydantic.ValidationError: (a ValueError) the template has no place for an instruction.
        """
        return type(self)(encoder=self.encoder.replace(**instructions(query, document)))

    def unload(self) -> None:
        """Let go of the model; see `Encoder.unload`."""
        self.encoder.unload()

    def __repr__(self) -> str:
        shown = [name for name in ("model_name", "token_set", "mode", "fingerprint") if name in self._config]
        return f"{type(self).__name__}({', '.join(f'{name}={self._config[name]!r}' for name in shown)})"

    @classmethod
    def build_from_config(cls, config: dict[str, Any]) -> Self:
        """The function that a database records; reads no file and never fails, the first call does."""
        function = cls.__new__(cls)
        function._encoder, function._config, function._checked = None, copy.deepcopy(config), False
        return function

    def get_config(self) -> dict[str, Any]:
        """What a database records: JSON-able values."""
        return copy.deepcopy(self._config)

    @classmethod
    def validate_config(cls, config: dict[str, Any]) -> None:
        """See that a record can be used.

        Raises:
            InputError: no fingerprint, or an entry that this version does not know.
            pydantic.ValidationError: (a ValueError) an impossible value.
        """
        settings = _without_fingerprint(config)
        if "fingerprint" not in config:
            raise InputError("the recorded configuration has no fingerprint: it was not written by this package")
        if unknown := sorted(settings.keys() - {*_RECORDED, *_RECORDED_OF_TOKEN_SETS}):
            raise InputError(
                f"the recorded configuration has {', '.join(unknown)}, which this version of echo-integrations does "
                "not know: upgrade it, or embed the texts again into a new collection"
            )
        cls._fields(**settings)

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """See that a change of the record leaves the vector space alone, such as another path of the same model.

        Chroma's ``collection.modify`` asks only after it wrote the change: do not change a function with it.

        Raises:
            FingerprintMismatchError: it does not; the message names the entries.
        """
        _compare("the collection", old_config, new_config, _FIXED)

    def default_space(self) -> Space:
        """The distance of new collections."""
        return "cosine"

    def _checked_encoder(self) -> Encoder:
        """The encoder, once its fingerprint has been seen to be the recorded one."""
        if not self._checked:
            _compare("the collection", self._config, {**self._config, "fingerprint": self.fingerprint})
            self._checked = True
        return self.encoder


class _EchoFields(EncoderFields):
    model_config = ConfigDict(title="EchoEmbeddingFunction")  # what errors call it
    modes = ECHO_MODES
    class_of_other_modes = "LLM2VecGenEmbeddingFunction"


class EchoEmbeddingFunction(_Function, EmbeddingFunction[Documents]):
    """Echo embeddings for Chroma; takes the arguments of `EncoderSettings`, or ``encoder=`` a ready `Encoder`.

    Recorded in the database: what defines the vectors, and their fingerprint; never device, dtype, token, cache
    folder, batch settings or ``trust_remote_code``. A function that Chroma builds from the record has the defaults
    for those: to choose them, reopen the collection with `open_collection`, not with ``client.get_collection``.

    Raises:
        pydantic.ValidationError: (a ValueError) an unknown or impossible argument.
        ModelLoadError: there is no such model; known without loading its weights.

    Example:
        >>> import chromadb
        >>> collection = open_collection(chromadb.EphemeralClient(), "notes", EchoEmbeddingFunction(model="echo-mini"))
        >>> collection.add(ids=["1", "2"], documents=["The valve is closed.", "Rain fell all night."])
        >>> collection.query(query_texts=["is the valve closed?"], n_results=1)["ids"]
        [['1']]

    Source: Springer et al., "Repetition Improves Language Model Embeddings", arXiv 2402.15449.
    """

    _fields = _EchoFields

    @staticmethod
    def name() -> str:
        """The name under which Chroma knows this class."""
        return "echo_integrations_echo"


class _LLM2VecGenFields(EncoderFields):
    model_config = ConfigDict(title="LLM2VecGenEmbeddingFunction")
    modes = TOKEN_SET_MODES
    class_of_other_modes = "EchoEmbeddingFunction"


class LLM2VecGenEmbeddingFunction(_Function, EmbeddingFunction[Documents]):
    """LLM2Vec-Gen embeddings for Chroma: of what the model would answer to a text, not of the text.

    Takes the arguments of `EncoderSettings`, or ``encoder=`` a ready `Encoder`: as the model a released checkpoint, or
    a backbone and ``token_set=`` a token set of your own. Where no instructions are given, the token set's are used or
    else the paper's, other ones for queries than for documents. Recorded as for `EchoEmbeddingFunction`, with the
    token set's place and the instructions that were used; a folder by its absolute path.

    Raises:
        pydantic.ValidationError: (a ValueError) an unknown or impossible argument.
        ModelLoadError: there is no such model or token set; known without loading the model's weights.
        TokenSetError: a damaged token set, or one of another backbone.

    Example:
        >>> import chromadb
        >>> function = LLM2VecGenEmbeddingFunction(model="echo-mini")
        >>> collection = open_collection(chromadb.EphemeralClient(), "answers", function)
        >>> collection.add(ids=["1"], documents=["The valve is closed."])
        >>> len(collection.get(include=["embeddings"])["embeddings"][0])
        384

    Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
    """

    _fields = _LLM2VecGenFields

    @staticmethod
    def name() -> str:
        """The name under which Chroma knows this class."""
        return "echo_integrations_llm2vec_gen"


AnyFunction = EchoEmbeddingFunction | LLM2VecGenEmbeddingFunction

register_embedding_function(EchoEmbeddingFunction)  # type: ignore[no-untyped-call]
register_embedding_function(LLM2VecGenEmbeddingFunction)  # type: ignore[no-untyped-call]


def open_collection(client: ClientAPI, name: str, function: AnyFunction, **kwargs: Any) -> Collection:
    """Open a collection with a function that fits it, or create it, with cosine distance unless told otherwise.

    Args:
        client: any synchronous Chroma client.
        name: of the collection.
        function: for its texts and queries; its device and dtype may differ from those that filled it.
        **kwargs: for a new collection, such as ``metadata`` and ``configuration``; an existing one keeps its own.

    Returns:
        The collection, bound to ``function``.

    Raises:
        FingerprintMismatchError: its vectors are of another vector space, or of another or unknown function.

    Example:
        >>> import chromadb
        >>> function = EchoEmbeddingFunction(model="echo-mini", mode="classical")
        >>> open_collection(chromadb.EphemeralClient(), "classical-notes", function).count()
        0
    """
    if not isinstance(function, AnyFunction):
        raise InputError(
            f"function is a {type(function).__name__}: pass an EchoEmbeddingFunction or an LLM2VecGenEmbeddingFunction"
        )
    configuration: Any = {**(kwargs.pop("configuration", None) or {}), "embedding_function": function}
    found = client.get_or_create_collection(name, embedding_function=None, configuration=configuration, **kwargs)
    record = found.configuration_json.get("embedding_function") or {}
    if record.get("name") != function.name():
        other = f"the embedding function {record['name']!r}" if "name" in record else "no embedding function"
        raise FingerprintMismatchError(
            f"collection {name!r} records {other}, this function gives vectors of fingerprint {function.fingerprint}: "
            "open the collection with what made it (langchain-chroma, for one, records nothing), or embed the texts "
            "again into a new one"
        )
    own = {**function.get_config(), "fingerprint": function.fingerprint}
    _compare(f"collection {name!r}", record["config"], own)
    return client.get_collection(name, embedding_function=function)  # type: ignore[arg-type]  # it wants images, too


def _record(encoder: Encoder) -> dict[str, Any]:
    """What a database records of an encoder."""
    record = {
        **{name: getattr(encoder, name) for name in _RECORDED},
        "model_kwargs": encoder.vector_space()["model_kwargs"],
        "fingerprint": encoder.fingerprint,
    }
    if encoder.mode in TOKEN_SET_MODES:
        record |= {name: getattr(encoder, name) for name in _RECORDED_OF_TOKEN_SETS}
        record |= {f"{role}_instruction": encoder.instruction(role) for role in Role}
    if encoder.token_set is not None and "model_name" not in encoder.model_fields_set:  # the set names its backbone
        _, tokens = resolve(encoder)
        record |= {"model_name": tokens.backbone, "revision": tokens.revision} if tokens else {}
    record |= {name: _lasting(record[name]) for name in ("model_name", "adapter", "token_set") if record.get(name)}
    plain: dict[str, Any] = json.loads(canonical_json(record))
    return plain


def _without_fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "fingerprint"}


def _lasting(place: str) -> str:
    """A local folder by its absolute path; a name as it is."""
    folder = Path(place).expanduser()
    return str(folder.resolve()) if place != BUILT_IN_MODEL and folder.is_dir() else place


def _compare(
    where: str, recorded: Mapping[str, Any], own: Mapping[str, Any], decisive: Set[str] = frozenset({"fingerprint"})
) -> None:
    """Refuse a record that differs from the recorded one in a decisive entry: both fingerprints, what differs."""
    different = {key for key in recorded.keys() | own.keys() if recorded.get(key) != own.get(key)}
    if not different & decisive:
        return
    keys = sorted(different - {"fingerprint"})
    settings = ", ".join(f"{key} ({recorded.get(key)!r} there, {own.get(key)!r} here)" for key in keys)
    raise FingerprintMismatchError(
        f"{where} holds vectors of fingerprint {recorded.get('fingerprint')}, this function gives "
        f"{own.get('fingerprint')}: "
        + (f"they differ in {settings}" if settings else "no setting differs, but the files of the model do")
        + "; use the settings and the model that the collection was made with, or embed the texts again into a new one"
    )
