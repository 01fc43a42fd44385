"""Embeddings of causal LMs, echo and LLM2Vec-Gen, for LangChain, LlamaIndex and Chroma.

Importing this package loads neither torch nor a framework; each name below is imported when it is first used.

Example:
    >>> from echo_integrations import Encoder
    >>> Encoder().encode_query("how do I reset the pump?").shape
    (256,)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echo_integrations.config import EchoIntegrationsError as EchoIntegrationsError
    from echo_integrations.config import EncoderSettings as EncoderSettings
    from echo_integrations.config import EncodingError as EncodingError
    from echo_integrations.config import FingerprintMismatchError as FingerprintMismatchError
    from echo_integrations.config import InputError as InputError
    from echo_integrations.config import Mode as Mode
    from echo_integrations.config import ModelLoadError as ModelLoadError
    from echo_integrations.config import OnTruncate as OnTruncate
    from echo_integrations.config import Pooling as Pooling
    from echo_integrations.config import TemplateError as TemplateError
    from echo_integrations.config import TokenSetError as TokenSetError
    from echo_integrations.config import TokenSetMismatchError as TokenSetMismatchError
    from echo_integrations.config import TruncationError as TruncationError
    from echo_integrations.config import TruncationWarning as TruncationWarning
    from echo_integrations.encoder import Encoder as Encoder
    from echo_integrations.reading import LensToken as LensToken
    from echo_integrations.recipe import PRESETS as PRESETS
    from echo_integrations.token_set import TokenSet as TokenSet

__version__ = "0.1.0"

_HOMES = {
    "Encoder": "encoder",
    "LensToken": "reading",
    "PRESETS": "recipe",
    "TokenSet": "token_set",
    **dict.fromkeys(
        (
            "EchoIntegrationsError",
            "EncoderSettings",
            "EncodingError",
            "FingerprintMismatchError",
            "InputError",
            "Mode",
            "ModelLoadError",
            "OnTruncate",
            "Pooling",
            "TemplateError",
            "TokenSetError",
            "TokenSetMismatchError",
            "TruncationError",
            "TruncationWarning",
        ),
        "config",
    ),
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
