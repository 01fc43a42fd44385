from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from echo_integrations.backbone import BackboneSpec, load
from echo_integrations.checkpoint import Checkpoint
from echo_integrations.training.config import LoraSettings, TrainingConfig
from echo_integrations.training.model import Batch, Student

LENGTHS = (7, 0, 30, 1, 30)  # of queries: none at all, and more than a sliding window of 8
ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "gpt_neox", "qwen2")


def student_of(folder: Path, **changes: Any) -> Student:
    config = TrainingConfig(**{"model": str(folder), "dtype": "float32", "thought_tokens": 3, "compression_tokens": 4,
                               **changes})  # fmt: skip
    checkpoint = Checkpoint.find(config.settings())
    student = Student(load(BackboneSpec.of(config.settings(), checkpoint)), 6, config)
    with torch.no_grad():
        student.rows.copy_(torch.randn(7, student.rows.shape[1], generator=torch.Generator().manual_seed(1)))
    return student.train()


def batch_of(vocabulary: int, lengths: tuple[int, ...] = LENGTHS, longest: int = 9) -> Batch:
    draw = np.random.default_rng(0)
    queries = [draw.integers(5, vocabulary, size).astype(np.int32) for size in lengths]
    responses = [draw.integers(5, vocabulary, 1 + size % longest).astype(np.int32) for size in lengths]
    targets = torch.randn(len(lengths), 6, generator=torch.Generator().manual_seed(2))
    return Batch(list(range(len(lengths))), queries, responses, targets)


def plain_loss(student: Student, folder: Path, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the rows, written plainly: one example at a time, everything with autograd."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    embedding = lm.get_input_embeddings()
    rows = student.rows.detach().clone().requires_grad_()
    total = torch.zeros(())
    for query, response, target in zip(batch.queries, batch.responses, batch.targets, strict=True):
        scale = getattr(embedding, "embed_scale", 1.0)  # Gemma multiplies what it looks up
        inputs = torch.cat([embedding(torch.from_numpy(query).long()), rows * scale])
        states = lm.base_model(inputs_embeds=inputs[None]).last_hidden_state[0, -4:]
        prompts = student.reconstruction(states)
        embedded = student.alignment(prompts).mean(0)
        labels = torch.from_numpy(response).long()
        logits = lm(inputs_embeds=torch.cat([prompts, embedding(labels)])[None]).logits[0, 3:-1]
        total = total + cross_entropy(logits, labels, reduction="sum") + (embedded - target).square().mean()
    (gradient,) = torch.autograd.grad(total, rows)
    return total.detach(), gradient


def own_loss(student: Student, batch: Batch) -> tuple[Tensor, Tensor]:
    student.zero_grad()
    total = torch.stack(list(student(batch).values())).sum()
    total.backward()
    assert student.rows.grad is not None
    return total.detach(), student.rows.grad


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-4) -> None:
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert (found[1] - expected[1]).abs().max() <= tolerance * expected[1].abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_cached_query_gives_the_plain_loss_and_gradient(tiny_model: Callable[[str], Path], name: str) -> None:
    student = student_of(tiny_model(name))
    assert student.cached
    limit = (7, 0, 20, 1, 20) if name == "gpt2" else LENGTHS
    batch = batch_of(300, limit)
    assert_close(own_loss(student, batch), plain_loss(student, tiny_model(name), batch))


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_gradient_checkpointing_gives_the_plain_loss_and_gradient(tiny_model: Any, name: str) -> None:
    student = student_of(tiny_model(name), gradient_checkpointing=True)
    assert not student.cached
    layers = [m for m in student._model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    assert layers, "nothing is checkpointed"
    batch = batch_of(300)
    assert_close(own_loss(student, batch), plain_loss(student, tiny_model(name), batch))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_a_new_adapter_changes_nothing_and_is_trained(tiny_model: Any, name: str, checkpointing: bool) -> None:
    student = student_of(tiny_model(name), lora=LoraSettings(dropout=0.0), gradient_checkpointing=checkpointing)
    batch = batch_of(300)
    assert_close(own_loss(student, batch), plain_loss(student, tiny_model(name), batch))
    gradients = {name: p.grad for name, p in student.lora.items()}
    assert gradients
    for key, gradient in gradients.items():  # the second factor starts at zero, so the first one's gradient is zero
        assert gradient is not None and bool(gradient.abs().max() > 0) == ("lora_B" in key), key


def test_the_lm_that_says_responses_is_the_plain_one(tiny_model: Any) -> None:
    """An adapter changes the student's states, not what the frozen LM makes of a soft prompt."""
    plain, adapted = student_of(tiny_model("qwen3")), student_of(tiny_model("qwen3"), lora=LoraSettings(dropout=0.0))
    with torch.no_grad():
        for parameter in adapted.lora.values():
            parameter.add_(0.3)
        batch = batch_of(300)
        prompts = plain.soft_prompts(plain.states(batch.queries))
        assert torch.allclose(plain.say(prompts, batch.responses), adapted.say(prompts, batch.responses), rtol=1e-6)
        assert not torch.allclose(plain.states(batch.queries), adapted.states(batch.queries), rtol=0.1)
    assert all(parameter.requires_grad for parameter in adapted.lora.values())


def test_gradients_of_an_adapter_are_those_of_the_whole_sequence(tiny_model: Any) -> None:
    """With and without checkpointing, dropout off, away from where the adapter starts."""
    found = []
    for checkpointing in (False, True):
        student = student_of(tiny_model("qwen3"), lora=LoraSettings(dropout=0.0), gradient_checkpointing=checkpointing)
        with torch.no_grad():
            for parameter in student.lora.values():
                parameter.add_(0.1)
        own_loss(student, batch_of(300))
        found.append({name: p.grad for name, p in student.lora.items()})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-4 * float(gradient.abs().max())), name


def test_a_batch_in_small_groups_gives_the_same(tiny_model: Any) -> None:
    student, batch = student_of(tiny_model("mistral")), batch_of(300)
    expected = own_loss(student, batch)
    expected = expected[0], expected[1].clone()
    student._budget = 20
    assert_close(own_loss(student, batch), expected)


def test_one_length_needs_no_mask(tiny_model: Any) -> None:
    student, batch = student_of(tiny_model("qwen3")), batch_of(300, (9, 9, 9))
    assert_close(own_loss(student, batch), plain_loss(student, tiny_model("qwen3"), batch))


def test_queries_without_a_token(tiny_model: Any) -> None:
    student, batch = student_of(tiny_model("qwen3")), batch_of(300, (0, 0))
    assert_close(own_loss(student, batch), plain_loss(student, tiny_model("qwen3"), batch))


def test_the_backbone_is_no_part_of_what_is_trained(tiny_model: Any) -> None:
    student = student_of(tiny_model("qwen3"))
    names = {"rows", *(f"{m}.{p}" for m in ("reconstruction", "alignment") for p in ("weight", "bias"))}
    assert set(student.state_dict()) == names
    assert not any(p.requires_grad for p in student._model.parameters())
    assert {p.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("changes", [{"bf16": True}, {"dtype": "bfloat16"}], ids=["autocast", "backbone"])
def test_bfloat16_is_near(tiny_model: Any, changes: dict[str, Any]) -> None:
    batch = batch_of(300)
    expected, gradient = own_loss(student_of(tiny_model("qwen3")), batch)
    loss, found = own_loss(student_of(tiny_model("qwen3"), **changes), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert loss.item() != expected.item()
    assert torch.cosine_similarity(found.flatten(), gradient.flatten(), dim=0) > 0.98


def test_ridge_is_the_closed_form_fit(tiny_model: Any) -> None:
    """Targets that are a linear function of the inputs are met; the random start misses them."""
    student = student_of(tiny_model("qwen3"))
    batch = batch_of(300, tuple(3 + i % 20 for i in range(200)))
    with torch.no_grad():
        inputs = student.reconstruction(student.states(batch.queries).mean(dim=1))
        truth = torch.randn(6, inputs.shape[1], generator=torch.Generator().manual_seed(3))
        targets = inputs @ truth.T + 2
        before = (student.embed(student.states(batch.queries)) - targets).square().mean()
        known = Batch(batch.indices, batch.queries, batch.responses, targets)
        student.fit_alignment(iter([known]))
        after = (student.embed(student.states(batch.queries)) - targets).square().mean()
    assert after < 0.02 * before


def test_where_rows_start(tiny_model: Any) -> None:
    embeddings = student_of(tiny_model("qwen3"))._embedding.weight
    config = {"model": str(tiny_model("qwen3")), "dtype": "float32", "thought_tokens": 200}
    checkpoint = Checkpoint.find(TrainingConfig(**config).settings())
    backbone = load(BackboneSpec.of(TrainingConfig(**config).settings(), checkpoint))
    random = Student(backbone, 6, TrainingConfig(**config)).rows
    mean = Student(backbone, 6, TrainingConfig(**config, rows_init="mean")).rows
    assert random.std().item() == pytest.approx(embeddings.std().item(), rel=0.1)
    assert (mean.mean(dim=0) - embeddings.mean(dim=0)).abs().max() < 0.03
    assert torch.equal(random, Student(backbone, 6, TrainingConfig(**config)).rows)
    assert not torch.equal(random, Student(backbone, 6, TrainingConfig(**config, seed=1)).rows)
