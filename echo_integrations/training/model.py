"""The student: trained tokens and two linear maps on a frozen backbone, run so that only they carry gradients.

The backbone is causal and the query stands before the trained tokens, so nothing that is trained reaches the query's
states: the query runs without autograd into a key-value cache, and only the tokens run with autograd behind it. Where
the cache cannot serve (gradient checkpointing, a trained adapter, an architecture without one), the whole sequence
runs with autograd; loss and gradient are the same.

Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from echo_integrations.backbone import Backbone
from echo_integrations.batching import plan
from echo_integrations.config import EncodingError, ModelLoadError
from echo_integrations.token_set import TokenSet
from echo_integrations.training import losses
from echo_integrations.training.config import LoraSettings, TrainingConfig, TrainingError

Ids = NDArray[np.int32]

_SAID_TOKENS = {"cpu": 512}  # whose activations are held at once while responses are said; elsewhere 2 048
_CACHED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tokenised examples.

    Attributes:
        indices: which examples they are, for messages.
        queries: (T_i,) token ids of each query, without the trained tokens.
        responses: (L_i,) token ids of each response, end of sequence included.
        targets: (B, D) the teacher's vectors of the responses.
        repeats: (T_i,) token ids of the repeat prompt and each response, where a loss term needs them.
        negatives: the same of each hard negative, of all examples.
        negative_targets: (K, D) the teacher's vectors of the negatives.
    """

    indices: list[int]
    queries: list[Ids]
    responses: list[Ids]
    targets: Tensor
    repeats: list[Ids] = field(default_factory=list)
    negatives: list[Ids] = field(default_factory=list)
    negative_targets: Tensor | None = None

    @property
    def labels(self) -> int:
        """Tokens of all responses."""
        return sum(map(len, self.responses))


class Student(nn.Module):
    """Rows and maps, float32, the only parameters; and the adapter's, where there is one.

    Args:
        backbone: frozen; one of its own if ``config.lora`` is given, because it is changed.
        dimension: D, of the teacher.
        config: what is trained, and how.
    """

    def __init__(self, backbone: Backbone, dimension: int, config: TrainingConfig) -> None:
        super().__init__()
        if backbone.lm is None:
            raise ModelLoadError(
                f"the checkpoint in {backbone.spec.checkpoint.folder} has no LM head, so it cannot say responses: "
                "use the causal LM's own checkpoint"
            )
        self._backbone, self._config = backbone, config
        self._hold("_embedding", backbone.model.get_input_embeddings())
        weight = self._embedding.weight
        hidden = weight.shape[1]
        draw = torch.Generator().manual_seed(config.seed)
        spread = weight.detach().float().std(dim=0).cpu()  # (H,)
        rows = torch.randn(config.tokens, hidden, generator=draw) * spread
        if config.rows_init == "mean":
            rows = weight.detach().float().mean(dim=0).cpu() + 0.1 * rows
        self.rows = nn.Parameter(rows)  # (M, H)
        self.reconstruction = _linear(hidden, hidden, draw)
        self.alignment = _linear(hidden, dimension, draw)
        if config.reconstruction_init == "identity":
            nn.init.eye_(self.reconstruction.weight)
        aligned = (config.alignment_weight, config.repeat_weight, config.margin_weight, config.contrastive_weight)
        self.alignment.requires_grad_(any(aligned))
        self._hold("_adapted", add_lora(backbone, config.lora, config.seed) if config.lora else None)
        parameters = {} if self._adapted is None else _trained(self._adapted)
        self.lora = nn.ParameterDict({name.replace(".", "/"): p for name, p in parameters.items()})
        self._hold("_model", backbone.model if self._adapted is None else self._adapted)
        self._hold("_run", torch.compile(self._model, dynamic=True) if config.compile else self._model)
        self._scale = float(getattr(self._embedding, "embed_scale", 1.0))  # Gemma 3 scales its embeddings
        self._budget = backbone.token_budget
        self.cached = self._adapted is None and not config.gradient_checkpointing and _has_cache(backbone.model)
        if config.gradient_checkpointing:
            model = backbone.model  # transformers renamed it
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.to(backbone.device)
        self.train(False)

    _embedding: Any
    _adapted: Any
    _model: Any
    _run: Any

    def _hold(self, name: str, module: Any) -> None:
        """Keep a part of the backbone without making it a part of this module, which is saved and shared out."""
        object.__setattr__(self, name, module)

    def train(self, mode: bool = True) -> Student:
        """As every module, and the adapter's dropout; the backbone's own dropout stays off."""
        super().train(mode)
        for name, module in self._model.named_modules():
            if "lora_dropout" in name or getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    def states(self, queries: Sequence[Ids]) -> Tensor:
        """(B, N, H) hidden states of the compression tokens behind queries, float32, in their order."""
        tokens = self._config.tokens
        batches = plan([len(ids) + tokens for ids in queries], self._budget)
        run = self._states_cached if self.cached else self._states_whole
        states = torch.cat([run([queries[i] for i in batch]) for batch in batches])
        order = torch.tensor([i for batch in batches for i in batch], device=states.device).argsort()
        return states[order][:, -self._config.compression_tokens :]

    def embed(self, states: Tensor) -> Tensor:
        """(B, N, H) states -> (B, D) embeddings; both maps are linear, so each is applied to the mean."""
        with torch.autocast(states.device.type, enabled=False):
            embeddings: Tensor = self.alignment(self.reconstruction(states.mean(dim=1)))
        return embeddings

    def soft_prompts(self, states: Tensor) -> Tensor:
        """(B, N, H) states -> (B, N, H) input vectors that make the frozen LM say the response."""
        with torch.autocast(states.device.type, enabled=False):
            prompts: Tensor = self.reconstruction(states)
        return prompts

    def say(self, soft_prompts: Tensor, responses: Sequence[Ids]) -> Tensor:
        """Cross-entropy of responses behind soft prompts, summed over all their tokens.

        No mask by token id: every token of a response is a label, its end of sequence too, padding never.

        Args:
            soft_prompts: (B, N, H).
            responses: (L_i,) token ids of each.
        """

        def compute(prompts: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
            total, grads = torch.zeros((), device=prompts.device), torch.zeros_like(prompts)
            budget = min(self._budget, _SAID_TOKENS.get(prompts.device.type, 2048))
            for rows in plan([len(ids) + prompts.shape[1] for ids in responses], budget):
                part = prompts[rows].requires_grad_(gradient)
                with torch.set_grad_enabled(gradient), self._plain():
                    states, labels = self._response_states(part, [responses[i] for i in rows])
                    loss, behind = losses.head_loss(states, labels, self.logits, gradient)
                    if behind is not None:
                        (grads[rows],) = torch.autograd.grad(states, part, behind)
                total += loss
            return total, grads if gradient else None

        loss: Tensor = losses.Known.apply(soft_prompts, compute)  # type: ignore[no-untyped-call]
        return loss

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums of the loss terms: reconstruction over the tokens, the others over the examples of the batch."""
        config = self._config
        terms: dict[str, Tensor] = {}
        count, extra = len(batch.queries), [*batch.repeats, *batch.negatives]
        states = self.states([*batch.queries, *extra])  # (B + B' + K, N, H)
        embeddings = self.embed(states)
        own, rest = embeddings[:count], embeddings[count:]
        repeats, negatives = rest[: len(batch.repeats)], rest[len(batch.repeats) :]
        targets = batch.targets.to(own.device)
        if config.reconstruction_weight:
            terms["reconstruction"] = self.say(self.soft_prompts(states[:count]), batch.responses)
        if config.alignment_weight:
            terms["alignment"] = losses.alignment(own, targets)
        if config.repeat_weight:
            terms["repeat"] = losses.alignment(repeats, targets)
            if batch.negative_targets is not None:
                terms["repeat"] = terms["repeat"] + losses.alignment(negatives, batch.negative_targets.to(own.device))
        if config.margin_weight:
            terms["margin"] = losses.margin(own, negatives, config.margin_threshold)
        if config.contrastive_weight:
            terms["contrastive"] = losses.contrastive(own, repeats, negatives, config.temperature)
        return terms

    @torch.no_grad()
    def fit_alignment(self, batches: Iterator[Batch]) -> None:
        """Set the alignment map to the ridge regression of the targets on the mean soft prompts."""
        inputs, targets = [], []
        for batch in batches:
            inputs.append(self.reconstruction(self.states(batch.queries).mean(dim=1)).double().cpu())
            targets.append(batch.targets.double().cpu())
        x, y = torch.cat(inputs), torch.cat(targets)  # (n, H), (n, D)
        x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
        gram = (x - x_mean).T @ (x - x_mean)
        gram += 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean)).T  # (D, H)
        self.alignment.weight.copy_(weight)
        self.alignment.bias.copy_(y_mean - weight @ x_mean)

    @torch.no_grad()
    def start_from(self, token_set: TokenSet) -> None:
        """Take over the rows and maps of a token set.

        Raises:
            TrainingError: it has other sizes, or an adapter.
        """
        sizes = {
            "tokens": (token_set.rows.shape[0], self.rows.shape[0]),
            "compression tokens": (token_set.compression, self._config.compression_tokens),
            "components": (token_set.dimension, self.alignment.weight.shape[0]),
        }
        different = [f"{there} {name} there, {here} here" for name, (there, here) in sizes.items() if there != here]
        if different or token_set.lora_config is not None:
            raise TrainingError(
                f"start_from={self._config.start_from!r} cannot be gone on from: "
                + ("; ".join(different) or "it adapts the backbone (LoRA)")
                + "; choose settings and a teacher like its own, or leave start_from out"
            )
        self.rows.copy_(token_set.rows)
        for name, tensor in token_set.maps.items():
            self.get_parameter(name).copy_(tensor)

    def token_set(self, **described: Any) -> TokenSet:
        """What was trained, as a token set; ``described`` says the rest of it."""
        adapter: dict[str, Any] = {}
        if self._adapted is not None and self._config.lora is not None:
            from peft import get_peft_model_state_dict

            tensors = get_peft_model_state_dict(self._adapted)
            adapter["lora"] = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            adapter["lora_config"] = _lora_arguments(
                self._config.lora, self._adapted.peft_config["default"].target_modules
            )
        maps = {f"{name}.{part}": tensor for name in ("reconstruction", "alignment") for part, tensor in
                getattr(self, name).named_parameters()}  # fmt: skip
        return TokenSet(
            rows=self.rows.detach().cpu().clone(),
            maps={name: tensor.detach().cpu().clone() for name, tensor in maps.items()},
            compression=self._config.compression_tokens,
            **adapter,
            **described,
        )

    def logits(self, states: Tensor) -> Tensor:
        """The frozen LM head: (n, H) states -> (n, V) logits."""
        with self._autocast():
            return self._backbone.logits(states)

    @torch.no_grad()
    def read(self, states: Tensor, max_new_tokens: int) -> list[str]:
        """What (B, N, H) states say, in words."""
        with self._plain():
            answers = self._backbone.generate(self.soft_prompts(states), max_new_tokens)
        return [self._backbone.spec.checkpoint.tokenizer.decode(ids) for ids in answers]

    def _states_cached(self, queries: Sequence[Ids]) -> Tensor:
        """(B, M, H): the queries, padded on the left, without autograd into a cache; then the tokens behind it."""
        lengths = torch.tensor([len(ids) for ids in queries], device=self.rows.device)
        longest = max(map(len, queries))
        tokens = torch.arange(self._config.tokens, device=self.rows.device)
        inputs: dict[str, Any] = {
            "inputs_embeds": self._rows().expand(len(queries), -1, -1),
            "position_ids": lengths[:, None] + tokens,
        }
        if longest:
            ids = np.zeros((len(queries), longest), dtype=np.int64)
            for row, query in zip(ids, queries, strict=True):
                row[longest - len(query) :] = query
            places = torch.arange(longest, device=self.rows.device) - (longest - lengths[:, None])  # (B, T)
            seen = places >= 0
            mask = None if bool(seen.all()) else seen.long()
            with torch.no_grad(), self._autocast():
                before = self._run(
                    input_ids=self._checked(ids),
                    attention_mask=mask,
                    position_ids=places.clamp(min=0),
                    use_cache=True,
                )
            inputs["past_key_values"] = before.past_key_values
            if mask is not None:
                inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(queries), len(tokens))], dim=1)
        with self._autocast():
            hidden: Tensor = self._run(**inputs, use_cache=True).last_hidden_state
        return hidden.float()

    def _states_whole(self, queries: Sequence[Ids]) -> Tensor:
        """(B, M, H): queries and tokens in one sequence, padded on the right, with autograd."""
        tokens = self._config.tokens
        ids = np.zeros((len(queries), max(map(len, queries)) + tokens), dtype=np.int64)  # (B, T)
        for row, query in zip(ids, queries, strict=True):
            row[: len(query)] = query
        starts = torch.tensor([len(query) for query in queries], device=self.rows.device)
        places = starts[:, None] + torch.arange(tokens, device=self.rows.device)  # (B, M)
        rows = torch.arange(len(queries), device=self.rows.device)[:, None]
        embeddings = self._embedding(self._checked(ids))  # (B, T, H)
        embeddings = embeddings.index_put((rows, places), self._rows().expand(len(queries), -1, -1))
        with self._autocast():
            hidden: Tensor = self._run(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return hidden[rows, places].float()

    def _response_states(self, prompts: Tensor, responses: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """(n, H) states that every token of the responses follows, and (n,) those tokens."""
        count, longest = prompts.shape[1], max(map(len, responses))
        ids = np.zeros((len(responses), longest), dtype=np.int64)  # (B, L), padded on the right
        valid = np.zeros((len(responses), longest), dtype=bool)
        for row, mask, response in zip(ids, valid, responses, strict=True):
            row[: len(response)] = response
            mask[: len(response)] = True
        labels = self._checked(ids)
        said = self._embedding(labels[:, :-1])  # the last token is followed by none
        inputs = torch.cat([prompts.to(said.dtype), said], dim=1)  # (B, N + L - 1, H)
        with self._autocast():
            hidden: Tensor = self._run(inputs_embeds=inputs, use_cache=False).last_hidden_state
        keep = torch.from_numpy(valid).to(labels.device)
        return hidden[:, count - 1 :][keep], labels[keep]

    def _rows(self) -> Tensor:
        """(M, H) what stands in for the embeddings of the trained tokens."""
        return (self.rows * self._scale).to(self._embedding.weight.dtype)

    def _checked(self, ids: NDArray[np.int64]) -> Tensor:
        vocabulary = self._embedding.weight.shape[0]
        if ids.size and ids.max() >= vocabulary:
            raise EncodingError(
                f"the tokenizer of {self._backbone.spec.checkpoint.name!r} gave token {ids.max()}, its model has only "
                f"{vocabulary} embedding rows: the two do not belong together"
            )
        return torch.from_numpy(ids).to(self.rows.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.rows.device.type, torch.bfloat16, enabled=bool(self._config.bf16))

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Meanwhile the adapter is out of the way: the LM that says responses is the frozen one."""
        if self._adapted is None:
            yield
            return
        try:
            with self._adapted.disable_adapter():
                yield
        finally:
            for parameter in self.lora.values():  # peft may forget that they are trained
                parameter.requires_grad_(True)


def add_lora(backbone: Backbone, settings: LoraSettings, seed: int) -> Any:
    """Wrap a backbone's base model in a new LoRA adapter, which is trained.

    Raises:
        TrainingError: peft cannot adapt this model.
    """
    from peft import LoraConfig, PeftModel

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return PeftModel(backbone.model, LoraConfig(**_lora_arguments(settings, settings.target_modules)))
    except ValueError as error:
        raise TrainingError(f"LoRA cannot be added to {backbone.spec.checkpoint.name!r}: {error}") from error


def _lora_arguments(settings: LoraSettings, modules: Any) -> dict[str, Any]:
    names = modules if modules is None or isinstance(modules, str) else sorted(modules)
    return {"r": settings.r, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "target_modules": names}


def _trained(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _linear(inputs: int, outputs: int, draw: torch.Generator) -> nn.Linear:
    """A linear map as PyTorch draws it, from a generator of its own: uniform within 1 / sqrt(inputs)."""
    layer = nn.Linear(inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((2 * torch.rand(parameter.shape, generator=draw) - 1) * bound)
    return layer


def _has_cache(model: Any) -> bool:
    """Whether a model keeps keys and values of causal attention and takes positions."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    takes = inspect.signature(model.forward).parameters
    stateful = getattr(model, "_is_stateful", False)
    return not stateful and layers <= _CACHED_LAYERS and {"position_ids", "past_key_values"} <= takes.keys()
