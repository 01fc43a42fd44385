"""What the framework adapters share: `EncoderSettings` as their fields, and the `Encoder` behind them.

This module knows nothing of any framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from echo_integrations.config import EncoderSettings, InputError
from echo_integrations.encoder import Encoder


class EncoderFields(EncoderSettings):
    """Fields of an embedding class: all of `EncoderSettings`, or a ready `Encoder` in their place."""

    encoder: Encoder | None = Field(default=None, exclude=True, repr=False)
    """A ready `Encoder`; its settings become this object's, so none may be given beside it."""

    _encoder: Encoder = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _take_settings_of_encoder(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("encoder"), Encoder):
            return data
        own = sorted(EncoderSettings.setting_names() & data.keys())
        if own:
            raise InputError(
                f"encoder= was given together with {', '.join(own)}: the encoder has settings of its own; "
                f"give one or the other, or encoder.replace({own[0]}=...)"
            )
        return {**data, **data["encoder"].settings()}

    @model_validator(mode="after")
    def _keep_encoder(self) -> Self:
        self._encoder = Encoder(**self.settings()) if self.encoder is None else self.encoder
        return self

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return self._encoder.dimension

    @property
    def fingerprint(self) -> str:
        """Name of the vector space; see `Encoder.fingerprint`."""
        return self._encoder.fingerprint

    def unload(self) -> None:
        """Let go of the model; see `Encoder.unload`."""
        self._encoder.unload()
