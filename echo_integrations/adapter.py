"""What the framework adapters share: `EncoderSettings` as their fields, the `Encoder` behind them, and its LM.

This module knows nothing of any framework.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeVar

from pydantic import Field, ValidationError, model_validator
from transformers import AutoTokenizer

from echo_integrations.backbone import BackboneSpec
from echo_integrations.config import EncoderSettings, InputError, Mode, Role
from echo_integrations.encoder import Encoder
from echo_integrations.registry import registry
from echo_integrations.resolve import resolve

T = TypeVar("T")

ECHO_MODES = (Mode.ECHO, Mode.CLASSICAL)
TOKEN_SET_MODES = (Mode.LLM2VEC_GEN,)


class EncoderFields(EncoderSettings):
    """Fields of an embedding class: all of `EncoderSettings`, or a ready `Encoder` in their place."""

    modes: ClassVar[tuple[Mode, ...]] = tuple(Mode)
    """The modes that the class is for, its default first."""
    class_of_other_modes: ClassVar[str] = ""
    """Name of the class for the others."""

    encoder: Encoder = Field(default_factory=Encoder, exclude=True, repr=False)
    """A ready `Encoder`; its settings become this object's, so none may be given beside it."""

    @model_validator(mode="before")
    @classmethod
    def _take_settings_of_encoder(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if data.get("encoder") is None:
            return cls._with_mode({name: value for name, value in data.items() if name != "encoder"})
        encoder, rest = data["encoder"], {name: value for name, value in data.items() if name != "encoder"}
        if not isinstance(encoder, Encoder):
            raise InputError(f"encoder is a {type(encoder).__name__}, not an Encoder: for a model's name pass model=")
        own = sorted(EncoderSettings.setting_names() & rest.keys())
        if own:
            raise InputError(
                f"encoder= was given together with {', '.join(own)}: the encoder has settings of its own; "
                f"give one or the other, or encoder.replace({own[0]}=...)"
            )
        cls._check_mode_of_class(encoder.mode)
        return {**data, **encoder.settings()}  # what it was not given keeps its default here, too

    @classmethod
    def _with_mode(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The arguments, seen to be of a mode of this class, which its default is put in for."""
        if "mode" in data:
            cls._check_mode_of_class(data["mode"])
        elif data.get("token_set") is not None:
            cls._check_mode_of_class(Mode.LLM2VEC_GEN)
        default = cls.modes[0]
        return data if default == EncoderSettings.model_fields["mode"].default else {"mode": default, **data}

    @classmethod
    def _check_mode_of_class(cls, mode: Any) -> None:
        if mode in list(Mode) and mode not in cls.modes:
            name = cls.model_config.get("title") or cls.__name__
            own = " and ".join(repr(str(m)) for m in cls.modes)
            raise InputError(f"{name} is for mode {own}, not {str(mode)!r}: use {cls.class_of_other_modes}")

    @model_validator(mode="after")
    def _make_encoder_of_settings(self) -> Self:
        if "encoder" not in self.model_fields_set:
            try:
                self.__dict__["encoder"] = Encoder(**self.settings())
            except ValidationError as error:  # about templates and instructions; one frame around it is enough
                raise InputError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    def _arguments(self) -> dict[str, Any]:
        return {name: value for name, value in super()._arguments().items() if name != "encoder"}

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return self.encoder.dimension

    @property
    def fingerprint(self) -> str:
        """Name of the vector space; see `Encoder.fingerprint`."""
        return self.encoder.fingerprint

    def with_instruction(self, query: str | None = None, *, document: str | None = None) -> Self:
        """A copy with other instructions; it shares the loaded model.

        Args:
            query: stands before queries; ``""`` for none, None to keep what there is.
            document: the same for documents. Texts that are indexed need to be embedded again.

        Raises:
            pydantic.ValidationError: (a ValueError) the template has no place for an instruction.
        """
        return self.replace(**instructions(query, document))

    def unload(self) -> None:
        """Let go of the model; see `Encoder.unload`."""
        self.encoder.unload()


def instructions(query: str | None, document: str | None) -> dict[str, str]:
    """The settings that instructions are; None gives none.

    Example:
        >>> instructions("Find the answer:", None)
        {'query_instruction': 'Find the answer:'}
    """
    given = {"query_instruction": query, "document_instruction": document}
    return {name: value for name, value in given.items() if value is not None}


def cache_name(encoder: Encoder, role: Role) -> str:
    """What keeps cached vectors of a role apart from all others: letters, digits, ``_``; needs the model's files.

    Example:
        >>> cache_name(Encoder(), Role.QUERY).count("_query_")
        1
    """
    instruction = hashlib.sha256(encoder.instruction(role).encode()).hexdigest()[:16]
    return f"{encoder.fingerprint}_{role}_{instruction}"


def share_lm(encoder: Encoder, build: Callable[[Any, Any], T]) -> T:
    """A generator over the weights that an encoder embeds with; they stay loaded while it is in use.

    Args:
        encoder: of any mode.
        build: makes the generator of the loaded causal LM and a tokenizer that nobody else uses, with a pad token.

    Returns:
        What ``build`` returns.

    Raises:
        InputError: no encoder, or a token set that adapts the backbone.
        ModelLoadError: the checkpoint has no LM head, or cannot be loaded.
    """
    if not isinstance(encoder, Encoder):
        raise InputError(
            f"encoder is a {type(encoder).__name__}, not an Encoder: of an embedding class pass its .encoder"
        )
    checkpoint, token_set = resolve(encoder)
    if token_set is not None and token_set.lora_config is not None:
        raise InputError(
            "the token set of this encoder adapts the backbone (LoRA), and so would what it answers: share the LM of "
            f"an encoder of the plain model, Encoder(model={checkpoint.name!r})"
        )
    spec = BackboneSpec.of(encoder, checkpoint, token_set)
    lm = registry.acquire(spec, encoder).causal_lm()
    tokenizer = AutoTokenizer.from_pretrained(
        str(checkpoint.folder), trust_remote_code=checkpoint.trust_remote_code, local_files_only=True
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # causal LMs have no use for token types
    tokenizer.padding_side = "left"  # an answer goes on from the end of its prompt
    if tokenizer.pad_token is None:  # masked wherever it stands
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
    generator = build(lm, tokenizer)
    registry.acquire(spec, generator)
    return generator
