"""`EchoEmbeddingFunction`: the encoder as a Chroma embedding function. Knows nothing of the other frameworks.

Chroma writes a function's configuration into the database and builds the function from it again, anew for every
query, wherever this module has been imported; it never compares what it built with what the vectors came from. So
the configuration carries the fingerprint, a function checks it at its first call, and `open_collection` compares.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from echo_integrations.adapter import EncoderFields
from echo_integrations.config import BUILT_IN_MODEL, FingerprintMismatchError, InputError, canonical_json
from echo_integrations.encoder import Encoder

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
_FIXED = {"fingerprint", *_RECORDED} - {"model_name", "revision", "adapter", "query_instruction"}
_HARMLESS_KWARGS = {"quantization_config"}  # others, such as weights_only, can make a model run code


class _Fields(EncoderFields):
    model_config = ConfigDict(title="EchoEmbeddingFunction")  # what errors call it


class EchoEmbeddingFunction(EmbeddingFunction[Documents]):
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

    def __init__(self, *, encoder: Encoder | None = None, **settings: Any) -> None:
        given: dict[str, Any] = {} if encoder is None else {"encoder": encoder}
        self._encoder: Encoder | None = _Fields(**settings, **given).encoder
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
            self._encoder = Encoder(**{key: value for key, value in self._config.items() if key != "fingerprint"})
        return self._encoder

    @property
    def fingerprint(self) -> str:
        """Name of the vector space; see `Encoder.fingerprint`."""
        return self.encoder.fingerprint

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return self.encoder.dimension

    def unload(self) -> None:
        """Let go of the model; see `Encoder.unload`."""
        self.encoder.unload()

    def __repr__(self) -> str:
        shown = ("model_name", "mode", "fingerprint")
        return f"EchoEmbeddingFunction({', '.join(f'{name}={self._config.get(name)!r}' for name in shown)})"

    @staticmethod
    def name() -> str:
        """The name under which Chroma knows this class."""
        return "echo_integrations_echo"

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> EchoEmbeddingFunction:
        """The function that a database records; reads no file and never fails, the first call does."""
        function = EchoEmbeddingFunction.__new__(EchoEmbeddingFunction)
        function._encoder, function._config, function._checked = None, copy.deepcopy(config), False
        return function

    def get_config(self) -> dict[str, Any]:
        """What a database records: JSON-able values."""
        return copy.deepcopy(self._config)

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """See that a record can be used.

        Raises:
            InputError: no fingerprint, or an entry that this version does not know.
            pydantic.ValidationError: (a ValueError) an impossible value.
        """
        settings = {key: value for key, value in config.items() if key != "fingerprint"}
        if "fingerprint" not in config:
            raise InputError("the recorded configuration has no fingerprint: it was not written by this package")
        if unknown := sorted(settings.keys() - set(_RECORDED)):
            raise InputError(
                f"the recorded configuration has {', '.join(unknown)}, which this version of echo-integrations does "
                "not know: upgrade it, or embed the texts again into a new collection"
            )
        Encoder(**settings)

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


register_embedding_function(EchoEmbeddingFunction)  # type: ignore[no-untyped-call]


def open_collection(client: ClientAPI, name: str, function: EchoEmbeddingFunction, **kwargs: Any) -> Collection:
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
    if not isinstance(function, EchoEmbeddingFunction):
        raise InputError(f"function is a {type(function).__name__}: pass an EchoEmbeddingFunction")
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
        "model_name": _lasting(encoder.model_name),
        "adapter": encoder.adapter and _lasting(encoder.adapter),
        "model_kwargs": encoder.vector_space()["model_kwargs"],
        "fingerprint": encoder.fingerprint,
    }
    plain: dict[str, Any] = json.loads(canonical_json(record))
    return plain


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
