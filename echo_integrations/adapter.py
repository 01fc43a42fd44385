"""What the framework adapters share: `EncoderSettings` as their fields, and the `Encoder` behind them.

This module knows nothing of any framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from echo_integrations.config import EncoderSettings, InputError
from echo_integrations.encoder import Encoder


class EncoderFields(EncoderSettings):
    """Fields of an embedding class: all of `EncoderSettings`, or a ready `Encoder` in their place."""

    encoder: Encoder = Field(default_factory=Encoder, exclude=True, repr=False)
    """A ready `Encoder`; its settings become this object's, so none may be given beside it."""

    @model_validator(mode="before")
    @classmethod
    def _take_settings_of_encoder(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "encoder" not in data:
            return data
        encoder, rest = data["encoder"], {name: value for name, value in data.items() if name != "encoder"}
        if encoder is None:
            return rest
        if not isinstance(encoder, Encoder):
            raise InputError(f"encoder is a {type(encoder).__name__}, not an Encoder: for a model's name pass model=")
        own = sorted(EncoderSettings.setting_names() & rest.keys())
        if own:
            raise InputError(
                f"encoder= was given together with {', '.join(own)}: the encoder has settings of its own; "
                f"give one or the other, or encoder.replace({own[0]}=...)"
            )
        return {**data, **encoder.settings()}  # what it was not given keeps its default here, too

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

    def unload(self) -> None:
        """Let go of the model; see `Encoder.unload`."""
        self.encoder.unload()
