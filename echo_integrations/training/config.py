"""Settings of a training run, and what can go wrong in one. Knows nothing of models or data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from echo_integrations.config import BUILT_IN_MODEL, EchoIntegrationsError, EncoderSettings, InputError

_STRICT = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

ValidationMetric = Literal["validation_cosine", "validation_recall_at_1", "validation_reconstruction"]


class TrainingError(EchoIntegrationsError):
    """A training run cannot go on, or cannot be resumed; the message says why and what is kept."""


class LoraSettings(BaseModel):
    """A LoRA adapter on the backbone, trained with the tokens; the paper's sizes are 8/16 and 32/64.

    Example:
        >>> LoraSettings(r=32, alpha=64).dropout
        0.05
    """

    model_config = _STRICT

    r: int = Field(default=8, ge=1)
    """Rank."""
    alpha: int = Field(default=16, ge=1)
    """Scale of the adapter, over the rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the adapter's inputs that are left out while training."""
    target_modules: list[str] | None = None
    """Names of the layers that get one; peft's choice for the architecture unless given."""


class TrainingConfig(BaseModel):
    """Every setting of `train`, with the paper's value as the default; keywords only, unknown names are refused.

    Example:
        >>> config = TrainingConfig(model="echo-mini", max_steps=500)
        >>> config.learning_rate, config.thought_tokens + config.compression_tokens
        (0.0003, 20)

    Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
    """

    model_config = _STRICT

    model: str = Field(default=BUILT_IN_MODEL, min_length=1)
    """The backbone: Hub id, local folder, or ``"echo-mini"``."""
    revision: str | None = None
    """Its branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the backbone may run."""
    device: str | None = None
    """``"cpu"``, ``"cuda"`` or ``"mps"``; the best one present unless given."""
    dtype: str = "auto"
    """Of the frozen backbone: ``"float32"``, ``"bfloat16"``, or ``"auto"``, bfloat16 where the hardware multiplies
    it. What is trained is kept in float32."""
    bf16: bool | None = None
    """True: the backbone multiplies in bfloat16 whatever its dtype; False: with ``dtype="auto"`` it is float32;
    None: as ``dtype`` says."""
    attn_implementation: str | None = None
    """``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` ...; transformers' choice unless given."""

    thought_tokens: int = Field(default=10, ge=0)
    """Trained tokens that are not read: scratch space."""
    compression_tokens: int = Field(default=10, ge=1)
    """Trained tokens whose hidden states are the embedding."""
    start_from: str | None = None
    """A token set of this backbone, folder or Hub id, to go on from, such as a general one for a domain: its rows,
    maps and instructions are where training starts. It must have as many tokens, and the teacher's dimension."""
    rows_init: Literal["random", "mean"] = "random"
    """Where new rows start: ``"random"``, normal with the spread of the backbone's embeddings; ``"mean"``, at the mean
    of the backbone's embeddings with a tenth of that spread."""
    reconstruction_init: Literal["random", "identity"] = "random"
    """Where the map to soft prompts starts: as PyTorch draws a linear map, or as the identity."""
    alignment_init: Literal["random", "ridge"] = "random"
    """Where the map to the teacher's space starts: as PyTorch draws a linear map, or as the ridge regression of the
    teacher's vectors of up to 4 096 examples on the untrained tokens' states."""
    lora: LoraSettings | None = None
    """A LoRA adapter on the backbone, trained as well; the whole query then runs with autograd."""

    reconstruction_weight: float = Field(default=1.0, ge=0)
    """Of the loss term in which the frozen LM says the response to the soft prompt."""
    alignment_weight: float = Field(default=1.0, ge=0)
    """Of the mean square error between embedding and the teacher's vector of the response."""
    teacher_scale: float | Literal["unit"] = 1.0
    """Factor on the teacher's vectors, or ``"unit"``: such that their components have a mean square of 1 over the
    training data. Cosine similarities do not change; the weight of alignment against reconstruction does."""
    repeat_weight: float = Field(default=0.0, ge=0)
    """Of a second student input, ``repeat_prompt`` and the response, that is aligned with the same vector."""
    margin_weight: float = Field(default=0.0, ge=0)
    """Of the term that keeps embeddings apart which do not belong together: max(0, threshold^2 - distance^2) between
    a query's embedding and those of the other queries and of all hard negatives of its batch."""
    margin_threshold: float = Field(default=10.0, ge=0)
    """The distance that the margin term asks for."""
    contrastive_weight: float = Field(default=0.0, ge=0)
    """Of InfoNCE by cosine: a query against its own response, the batch's other responses and all hard negatives, each
    embedded by the student behind ``repeat_prompt``."""
    temperature: float = Field(default=0.05, gt=0)
    """Of the contrastive term."""
    repeat_prompt: str = "Repeat this text word by word."
    """What stands before a response or a hard negative when the student embeds it."""

    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak, of Adam; the paper uses 3e-4 for Qwen3 and 5e-4 for Llama and Qwen2.5."""
    rows_learning_rate: float | None = Field(default=None, gt=0)
    """Of the tokens' rows, where it is to differ from that of the maps."""
    max_steps: int = Field(default=5000, ge=1)
    """Optimiser steps."""
    decay_steps: int = Field(default=20_000, ge=1)
    """Steps after which the linear decay of the learning rate would reach zero; training stops before."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps in which the learning rate rises from zero."""
    batch_size: int = Field(default=32, ge=1)
    """Examples of one optimiser step, over all processes and accumulated parts together: the result does not depend
    on how many there are of either."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Parts in which a process takes its share of a batch, to save memory."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0: never."""
    seed: int = 42
    """Of new rows and maps, and of the order of the examples."""
    gradient_checkpointing: bool = False
    """Compute activations twice rather than keep them; the query cache is then not used."""
    compile: bool = False
    """Whether the backbone is compiled with torch.compile."""

    max_query_length: int = Field(default=512, ge=2)
    """Tokens of a query, instruction and trained tokens included; the rest is cut."""
    max_response_length: int = Field(default=512, ge=1)
    """Tokens of a response, end of sequence included; the rest is cut."""
    training_instruction: str = ""
    """What stands before each query while training; the paper trains on bare queries."""
    query_instruction: str | None = None
    """Kept in the token set as what stands before queries; None leaves the paper's."""
    document_instruction: str | None = None
    """The same for documents."""

    validation_examples: int = Field(default=256, ge=0)
    """Examples held out of training; 0: no validation."""
    validate_every: int = Field(default=500, ge=1)
    """Steps between validations; there is one at the end, too."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better one, and keep the best; None: train to the end."""
    early_stopping_metric: ValidationMetric = "validation_cosine"
    """What "better" means."""
    samples: int = Field(default=8, ge=0)
    """Held-out queries whose embedding is read back in words for the report."""
    save_every: int = Field(default=500, ge=1)
    """Steps between checkpoints; there is one at the end, too."""
    log_every: int = Field(default=10, ge=1)
    """Steps between entries of the loss curve."""
    report: bool = True
    """Whether a report is drawn at the end; without one matplotlib is not needed."""
    report_to: str | list[str] = "none"
    """``"tensorboard"`` or whatever else transformers reports to."""
    teacher_folder: str | None = None
    """Where the teacher's vectors are kept for other runs; ``teacher-vectors`` beside the result unless given."""

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        r"""Read settings from a YAML file of names and values.

        Raises:
            InputError: no such file, or no YAML mapping.
            pydantic.ValidationError: (a ValueError) an unknown name or impossible value.

        Example:
            >>> import pathlib, tempfile
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "mini.yaml"
            >>> _ = path.write_text("model: echo-mini\nlearning_rate: 1e-3\n")
            >>> TrainingConfig.from_yaml(path).learning_rate
            0.001
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path} cannot be read as YAML ({type(error).__name__}: {error})") from error
        if not isinstance(content, dict):
            raise InputError(f"{path} holds no 'name: value' lines: write one a setting, such as 'model: echo-mini'")
        return cls(**content)

    @field_validator("dtype", mode="before")
    @classmethod
    def _check_dtype(cls, value: Any) -> Any:
        return EncoderSettings(dtype=value).dtype

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be taken in {self.gradient_accumulation_steps} equal parts: "
                "change gradient_accumulation_steps"
            )
        if self.early_stopping_patience is not None and not self.validation_examples:
            raise ValueError("early_stopping_patience needs validation_examples: hold some out")
        if self.max_query_length <= self.tokens:
            raise ValueError(
                f"max_query_length={self.max_query_length} leaves no room beside {self.tokens} trained tokens"
            )
        weights = (self.reconstruction_weight, self.alignment_weight, self.repeat_weight)
        if not any((*weights, self.margin_weight, self.contrastive_weight)):
            raise ValueError("every weight is 0: there is nothing to learn")
        return self

    @property
    def tokens(self) -> int:
        """M, trained tokens of both kinds."""
        return self.thought_tokens + self.compression_tokens

    def settings(self) -> EncoderSettings:
        """The backbone in an encoder's words."""
        dtype = {True: "auto", False: "float32", None: "auto"}[self.bf16] if self.dtype == "auto" else self.dtype
        return EncoderSettings(
            model=self.model,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            device=self.device,
            dtype="bfloat16" if self.bf16 and self.dtype == "auto" else dtype,
            attn_implementation=self.attn_implementation,
        )

    def outcome(self) -> dict[str, Any]:
        """The settings that a run cannot change when it is resumed, as JSON has them."""
        return self.model_dump(mode="json", exclude=_OPERATIONAL)


_OPERATIONAL = {
    *("device", "dtype", "bf16", "attn_implementation", "gradient_checkpointing", "compile"),
    *("gradient_accumulation_steps", "max_steps", "validate_every", "early_stopping_patience", "early_stopping_metric"),
    *("samples", "save_every", "log_every", "report", "report_to", "teacher_folder", "revision", "model"),
}
