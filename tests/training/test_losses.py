import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echo_integrations.backbone import BackboneSpec, load
from echo_integrations.checkpoint import Checkpoint
from echo_integrations.token_set import TokenSet
from echo_integrations.training import losses
from echo_integrations.training.batches import Examples
from echo_integrations.training.config import TrainingConfig
from echo_integrations.training.data import Example
from echo_integrations.training.model import Batch, Student
from echo_integrations.training.teacher import TeacherVectors
from tests.training.common import Letters


def step(data: Path, tmp_path: Path, name: str, **changes: Any) -> tuple[Any, Student, Batch]:
    """The step that was recorded: four queries, four responses, the token set of the fixture."""
    expected = np.load(data / name / "loss.npz")
    texts = json.loads((data / "texts.json").read_text(encoding="utf-8"))["texts"]
    config = TrainingConfig(model=str(data / name / "base"), dtype="float32", **changes)
    checkpoint = Checkpoint.find(config.settings())
    student = Student(load(BackboneSpec.of(config.settings(), checkpoint)), expected["teacher"].shape[1], config)
    token_set = TokenSet.load(data / name / "llm2vec_gen")
    student.load_state_dict({"rows": token_set.rows, **token_set.maps})
    examples = [Example(query, response) for query, response in zip(texts[:4], texts[4:8], strict=True)]
    vectors = TeacherVectors(Letters(), tmp_path / "teacher")
    batch = Examples(examples, checkpoint.tokenizer, checkpoint.positions, vectors, config).batch(range(4))
    teacher = torch.from_numpy(expected["teacher"]).float()
    return expected, student.train(), Batch(batch.indices, batch.queries, batch.responses, teacher)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_step_on_qwen3_is_that_of_the_released_code(data: Path, tmp_path: Path, checkpointing: bool) -> None:
    expected, student, batch = step(data, tmp_path, "qwen3", gradient_checkpointing=checkpointing)
    terms = student(batch)
    reconstruction, alignment = terms["reconstruction"] / batch.labels, terms["alignment"] / 4
    assert reconstruction.item() == pytest.approx(expected["recon"], rel=1e-5)
    assert alignment.item() == pytest.approx(expected["align"], rel=1e-5)
    (reconstruction + alignment).backward()
    difference = np.abs(student.rows.grad.numpy() - expected["token_grad"]).max()
    assert difference <= 1e-5 * np.abs(expected["token_grad"]).max()


def test_one_step_on_llama_differs_from_the_released_code_by_the_label_that_it_loses(
    data: Path, tmp_path: Path
) -> None:
    """There pad = eos, and the released code masks by id, so the model never learns to stop."""
    expected, student, batch = step(data, tmp_path, "llama")
    end = student._backbone.spec.checkpoint.tokenizer.eos_id
    assert all(ids[-1] == end for ids in batch.responses)
    without = Batch(batch.indices, batch.queries, [ids[:-1] for ids in batch.responses], batch.targets)
    terms = student(without)
    reconstruction, alignment = terms["reconstruction"] / without.labels, terms["alignment"] / 4
    assert reconstruction.item() == pytest.approx(expected["recon"], rel=1e-5)
    assert alignment.item() == pytest.approx(expected["align"], rel=1e-5)
    (reconstruction + alignment).backward()
    difference = np.abs(student.rows.grad.numpy() - expected["token_grad"]).max()
    assert difference <= 1e-5 * np.abs(expected["token_grad"]).max()


def test_the_end_of_a_response_is_a_label_where_pad_is_eos(data: Path, tmp_path: Path) -> None:
    """The loss with it, less that without it, is what the model says of it, computed one response at a time."""
    _, student, batch = step(data, tmp_path, "llama")
    without = Batch(batch.indices, batch.queries, [ids[:-1] for ids in batch.responses], batch.targets)
    with torch.no_grad():
        prompts = student.soft_prompts(student.states(batch.queries))
        difference = (student(batch)["reconstruction"] - student(without)["reconstruction"]).item()
        lm: Any = student._backbone.lm
        surprise = 0.0
        for prompt, ids in zip(prompts, batch.responses, strict=True):
            said = lm.get_input_embeddings()(torch.from_numpy(ids[:-1]).long())
            logits = lm(inputs_embeds=torch.cat([prompt, said])[None]).logits[0, -1]
            surprise -= logits.log_softmax(-1)[ids[-1]].item()
    assert difference == pytest.approx(surprise, rel=1e-4)


def test_a_head_in_small_parts_gives_the_loss_and_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_LOGITS", 3 * 50)  # three positions at a time
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(8, 50), torch.randint(50, (10,))
    states = torch.randn(10, 8, requires_grad=True)
    whole = torch.nn.functional.cross_entropy(head(states), labels, reduction="sum")
    (expected,) = torch.autograd.grad(whole, states)
    loss, gradient = losses.head_loss(states, labels, head)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert gradient is not None and torch.allclose(gradient, expected, atol=1e-6)


def test_alignment_is_the_mean_over_dimensions() -> None:
    assert losses.alignment(torch.zeros(2, 4), torch.tensor([[2.0] * 4, [1.0] * 4])).item() == 5.0


def test_margin_counts_each_other_pair_once() -> None:
    queries, negatives = torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0]])
    # squared distances: 9 and 1 for the first, 9 and 4 for the second; t^2 = 10
    assert losses.margin(queries, negatives, math.sqrt(10)).item() == pytest.approx((1 + 9 + 1 + 6) / 2)


def test_contrastive_is_the_cross_entropy_of_cosines() -> None:
    one, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    loss = losses.contrastive(torch.cat([one, other]), torch.cat([one, other]), one, temperature=0.5)
    first = math.log((math.exp(2) * 2 + 1) / math.exp(2))  # its own and the negative are equal
    second = math.log((math.exp(2) + 2) / math.exp(2))
    assert loss.item() == pytest.approx(first + second, rel=1e-6)
