"""The two kinds of embedding class that every framework has, so that one test holds both to the same contract."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_integrations.encoder import Encoder


@dataclass(frozen=True)
class Kind:
    """An embedding class, its mode, and settings that lay queries out unlike documents."""

    cls: Any
    mode: str
    settings: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(cls: Any, tokens: Path) -> "Kind":
        """Echo, or LLM2Vec-Gen with a token set of the built-in model."""
        if cls.__name__.startswith("LLM2VecGen"):
            return Kind(cls, "llm2vec-gen", {"dtype": "float32", "token_set": str(tokens)})
        template = "{!%%prompt%%: }Rewrite the question: {!%%text%%} The rewritten question: {%%text%%}"
        return Kind(cls, "echo", {"dtype": "float32", "query_template": template})

    def make(self, **changes: Any) -> Any:
        """An object of the class."""
        return self.cls(**{**self.settings, **changes})

    def encoder(self, **changes: Any) -> Encoder:
        """The encoder that such an object should be like."""
        return Encoder(**{"mode": self.mode, **self.settings, **changes})

    @property
    def other(self) -> dict[str, Any]:
        """Settings that make another vector space."""
        return {"mode": "classical"} if self.mode == "echo" else {"document_instruction": ""}

    @property
    def short(self) -> int:
        """A ``max_length`` that cuts every sentence."""
        return 3 if self.mode == "echo" else 8

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return 256 if self.mode == "echo" else 24

    @property
    def name(self) -> str:
        """Of the class."""
        return str(self.cls.__name__)
