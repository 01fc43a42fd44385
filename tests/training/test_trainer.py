import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from echo_integrations.config import InputError, TokenSetMismatchError
from echo_integrations.encoder import Encoder
from echo_integrations.token_set import TokenSet
from echo_integrations.training import TrainingConfig, TrainingError, train
from echo_integrations.training.batches import Order
from echo_integrations.training.config import LoraSettings
from echo_integrations.training.data import Example, split
from tests.training.common import Letters, examples

REPOSITORY = Path(__file__).parents[2]


def config_of(model: Path | str, **changes: Any) -> TrainingConfig:
    defaults = {"dtype": "float32", "thought_tokens": 2, "compression_tokens": 3, "max_steps": 6, "batch_size": 8,
                "warmup_steps": 2, "learning_rate": 0.01, "validation_examples": 6, "validate_every": 3,
                "save_every": 3, "log_every": 1, "samples": 2, "report": False}  # fmt: skip
    return TrainingConfig(model=str(model), **{**defaults, **changes})


def state(out: Path) -> dict[str, Any]:
    """Transformers' record of the last checkpoint."""
    last = max(out.with_name(f"{out.name}.training").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    return dict(json.loads((last / "trainer_state.json").read_text(encoding="utf-8")))


def curve(out: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in state(out)["log_history"] if name in row]


def same(one: TokenSet, other: TokenSet) -> bool:
    return torch.equal(one.rows, other.rows) and all(torch.equal(one.maps[key], other.maps[key]) for key in one.maps)


def test_a_run_gives_a_token_set_and_a_report(tiny_model: Any, tmp_path: Path) -> None:
    config = config_of(
        tiny_model("qwen3"), query_instruction="", document_instruction="Say it:", max_steps=30, report=True
    )
    out = tmp_path / "sets" / "tiny"
    token_set = train(config, examples(40), teacher=Letters(), out=out)
    losses = curve(out)
    assert len(losses) == 30 and losses[-1] < 0.8 * losses[0]
    loaded = TokenSet.load(out)
    assert same(loaded, token_set)
    assert (loaded.rows.shape, loaded.compression, loaded.dimension) == ((5, 32), 3, 6)
    assert loaded.instructions == {"query": "", "document": "Say it:"}
    assert loaded.teacher == "letters"
    assert loaded.training["steps"] == 30 and loaded.training["data"]["validation"] == 6
    assert loaded.training["config"]["learning_rate"] == 0.01
    assert {path.name for path in (out / "report").iterdir()} == {
        *("index.html", "history.jsonl", "loss.png", "validation.png", "similarity.png")
    }
    history = [json.loads(line) for line in (out / "report" / "history.jsonl").read_text().splitlines()]
    first = next(row for row in history if row["step"] == 1)
    assert first["loss"] == pytest.approx(first["reconstruction"] + first["alignment"], rel=1e-5)

    held_out = split(examples(40), 6, config.seed)[1]
    encoder = Encoder(model=str(tiny_model("qwen3")), mode="llm2vec-gen", token_set=out, dtype="float32")
    vectors = encoder.encode_query([example.query for example in held_out])
    teacher = Letters().embed([example.response for example in held_out])
    teacher /= np.linalg.norm(teacher, axis=1, keepdims=True)
    cosine = float((vectors * teacher).sum(axis=1).mean())
    assert loaded.training["metrics"]["validation_cosine"] == pytest.approx(cosine, abs=1e-5)
    hits = (vectors @ teacher.T).argmax(axis=1) == np.arange(6)
    assert loaded.training["metrics"]["validation_recall_at_1"] == pytest.approx(hits.mean())


def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_model: Any, tmp_path: Path) -> None:
    config = config_of(tiny_model("llama"))
    straight = train(config, examples(30), teacher=Letters(), out=tmp_path / "straight")
    train(config_of(tiny_model("llama"), max_steps=3), examples(30), teacher=Letters(), out=tmp_path / "broken")
    resumed = train(config, examples(30), teacher=Letters(), out=tmp_path / "broken")
    assert same(straight, resumed)
    assert curve(tmp_path / "straight") == curve(tmp_path / "broken")
    assert not same(straight, train(config_of(tiny_model("llama"), max_steps=3), examples(30), teacher=Letters(),
                                    out=tmp_path / "short"))  # fmt: skip


def test_resume_false_starts_anew(tiny_model: Any, tmp_path: Path) -> None:
    first = train(config_of(tiny_model("qwen3"), max_steps=3), examples(30), teacher=Letters(), out=tmp_path / "out")
    other = config_of(tiny_model("qwen3"), max_steps=2, seed=1)
    again = train(other, examples(30), teacher=Letters(), out=tmp_path / "out", resume=False)
    assert not same(first, again)
    assert len(curve(tmp_path / "out")) == 2


def test_parts_of_a_batch_give_the_loss_of_the_whole(tiny_model: Any, tmp_path: Path) -> None:
    for parts in (1, 4):
        config = config_of(tiny_model("qwen3"), gradient_accumulation_steps=parts)
        train(config, examples(30), teacher=Letters(), out=tmp_path / str(parts))
    for name in ("loss", "reconstruction", "alignment"):
        assert curve(tmp_path / "1", name) == pytest.approx(curve(tmp_path / "4", name), rel=1e-5)


def test_two_processes_give_the_loss_curve_of_one(tiny_model: Any, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from echo_integrations.training import train
from tests.training.common import Letters, examples
from tests.training.test_trainer import config_of
train(config_of(sys.argv[1], device="cpu"), examples(30), teacher=Letters(), out=Path(sys.argv[2]))
"""
    script = tmp_path / "run.py"
    script.write_text(code, encoding="utf-8")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    for processes in ("1", "2"):  # --multi_gpu is its word for torchrun; device="cpu" then chooses gloo
        several = ["--cpu"] if processes == "1" else ["--multi_gpu"]
        arguments = [*launcher, *several, "--num_processes", processes, str(script), str(tiny_model("qwen3"))]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*arguments, str(tmp_path / processes)], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
    world = len(list((tmp_path / "2.training" / "checkpoint-6").glob("rng_state*")))
    assert world == 2
    for name in ("loss", "reconstruction", "alignment", "validation_cosine"):
        assert curve(tmp_path / "1", name) == pytest.approx(curve(tmp_path / "2", name), rel=1e-3)


def test_a_loss_that_is_no_number_stops_and_names_the_batch(tiny_model: Any, tmp_path: Path) -> None:
    config = config_of(tiny_model("qwen3"), learning_rate=1e30, warmup_steps=0, max_grad_norm=0, save_every=1)
    with pytest.raises(
        TrainingError, match=r"step 2: .* not finite .*batch of examples \[\d+, .*checkpoint-1"
    ) as caught:
        train(config, examples(30), teacher=Letters(), out=tmp_path / "out")
    order = Order(24, config.batch_size, config.max_steps, config.seed)
    assert str(sorted(list(order)[1])) in str(caught.value)
    assert (tmp_path / "out.training" / "checkpoint-1" / "run.json").is_file()
    assert not (tmp_path / "out").exists()


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond a size: the system refuses to write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_checkpoint_before(tiny_model: Any, tmp_path: Path) -> None:
    out, config = tmp_path / "out", config_of(tiny_model("qwen3"))
    straight = train(config, examples(30), teacher=Letters(), out=tmp_path / "straight")
    train(config_of(tiny_model("qwen3"), max_steps=3), examples(30), teacher=Letters(), out=out)
    with small_disk(4000), pytest.raises(TrainingError, match="step 6 cannot be written .*checkpoint-3 stays"):
        train(config, examples(30), teacher=Letters(), out=out)
    assert [path.name for path in tmp_path.glob("out.training/checkpoint-*")] == ["checkpoint-3"]
    assert same(straight, train(config, examples(30), teacher=Letters(), out=out))


def test_ctrl_c_writes_a_checkpoint_to_go_on_from(tiny_model: Any, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    out, config = tmp_path / "out", config_of(tiny_model("qwen3"), max_steps=60, save_every=5, validate_every=100)
    straight = train(config, examples(30), teacher=Letters(), out=tmp_path / "straight")

    def interrupt() -> None:
        while not (tmp_path / "out.training" / "checkpoint-5" / "run.json").is_file():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step \d+ of 60; .*make the same call again") as caught:
        train(config, examples(30), teacher=Letters(), out=out)
    stopped = int(str(caught.value).split("after step ")[1].split()[0])
    assert 5 <= stopped < 60
    assert (tmp_path / "out.training" / f"checkpoint-{stopped}" / "run.json").is_file()
    assert not out.exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert same(straight, train(config, examples(30), teacher=Letters(), out=out))


def test_another_run_is_not_resumed(tiny_model: Any, tmp_path: Path) -> None:
    out, model = tmp_path / "out", tiny_model("qwen3")
    train(config_of(model, max_steps=2), examples(30), teacher=Letters(), out=out)
    other = tiny_model("llama")
    with pytest.raises(TrainingError, match="backbone") as caught:
        train(config_of(other), examples(30), teacher=Letters(), out=out)
    assert repr(str(model)) in str(caught.value) and repr(str(other)) in str(caught.value)
    with pytest.raises(TrainingError, match=r"dimension \(6 there, 5 here\)"):
        train(config_of(model), examples(30), teacher=Letters(5), out=out)
    with pytest.raises(TrainingError, match="the data .hash"):
        train(config_of(model), examples(31), teacher=Letters(), out=out)
    with pytest.raises(TrainingError, match=r"learning_rate \(0.01 there, 0.1 here\).*resume=False"):
        train(config_of(model, learning_rate=0.1), examples(30), teacher=Letters(), out=out)
    train(config_of(model, log_every=2), examples(30), teacher=Letters(), out=out)  # makes no other result


def test_early_stopping_keeps_the_best(tiny_model: Any, tmp_path: Path) -> None:
    changes = {"max_steps": 40, "validate_every": 2, "early_stopping_patience": 2, "learning_rate": 0.3}
    config = config_of(tiny_model("qwen3"), **changes, early_stopping_metric="validation_reconstruction")
    token_set = train(config, examples(30), teacher=Letters(), out=tmp_path / "out")
    values = curve(tmp_path / "out", "validation_reconstruction")
    best = values.index(min(values))
    assert len(values) - 1 - best == 2 and token_set.training["steps"] == 2 * len(values) < 40
    assert token_set.training["metrics"]["validation_reconstruction"] == pytest.approx(min(values), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_is_trained_saved_and_used(tiny_model: Any, tmp_path: Path, checkpointing: bool) -> None:
    config = config_of(tiny_model("qwen3"), lora=LoraSettings(r=4), gradient_checkpointing=checkpointing)
    token_set = train(config, examples(30), teacher=Letters(), out=tmp_path / "out")
    moved = [name for name, tensor in token_set.lora.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert moved and len(moved) == len(token_set.lora) // 2
    held_out = split(examples(30), 6, config.seed)[1]
    encoder = Encoder(mode="llm2vec-gen", token_set=tmp_path / "out", dtype="float32", query_instruction="")
    vectors = encoder.encode_query([example.query for example in held_out])
    teacher = Letters().embed([example.response for example in held_out])
    cosine = (vectors * teacher).sum(axis=1) / np.linalg.norm(teacher, axis=1)
    assert token_set.training["metrics"]["validation_cosine"] == pytest.approx(cosine.mean(), abs=1e-5)


def test_the_supervised_variant(tiny_model: Any, tmp_path: Path) -> None:
    weights = {"repeat_weight": 0.5, "margin_weight": 0.1, "contrastive_weight": 1.0, "margin_threshold": 3.0}
    config = config_of(tiny_model("qwen3"), **weights, max_steps=25)
    train(config, examples(30, negatives=2), teacher=Letters(), out=tmp_path / "out")
    names = ("reconstruction", "alignment", "repeat", "margin", "contrastive")
    curves = {name: curve(tmp_path / "out", name) for name in names}
    total = [sum(parts) for parts in zip(*(np.multiply(curves[n], getattr(config, f"{n}_weight")) for n in names),
                                         strict=True)]  # fmt: skip
    assert curve(tmp_path / "out") == pytest.approx(total, rel=1e-4)
    assert curves["contrastive"][-1] < curves["contrastive"][0]


def test_options_of_the_start(tiny_model: Any, tmp_path: Path) -> None:
    options = {"rows_init": "mean", "reconstruction_init": "identity", "alignment_init": "ridge"}
    config = config_of(tiny_model("qwen3"), **options, teacher_scale="unit", rows_learning_rate=0.02, max_steps=2)
    train(config, examples(40), teacher=Letters(), out=tmp_path / "fitted")
    train(config_of(tiny_model("qwen3"), teacher_scale="unit", max_steps=2), examples(40), teacher=Letters(),
          out=tmp_path / "random")  # fmt: skip
    assert curve(tmp_path / "fitted", "alignment")[0] < 0.5 * curve(tmp_path / "random", "alignment")[0]


def test_a_run_starts_from_another_token_set(tiny_model: Any, tmp_path: Path) -> None:
    """Where the one before it ended, so that its first loss is lower; the instructions come along."""
    first = config_of(tiny_model("qwen3"), max_steps=20, query_instruction="Ask:")
    train(first, examples(40), teacher=Letters(), out=tmp_path / "first")
    second = config_of(tiny_model("qwen3"), max_steps=1, learning_rate=1e-9, start_from=str(tmp_path / "first"))
    further = train(second, examples(40), teacher=Letters(), out=tmp_path / "second")
    assert curve(tmp_path / "second")[0] < 0.9 * curve(tmp_path / "first")[0]
    before = TokenSet.load(tmp_path / "first")
    torch.testing.assert_close(further.rows, before.rows, atol=1e-6, rtol=0)
    assert further.instructions == before.instructions != {}


def test_a_token_set_that_cannot_be_started_from_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    train(config_of(tiny_model("qwen3"), max_steps=1), examples(20), teacher=Letters(), out=tmp_path / "first")
    start = {"start_from": str(tmp_path / "first"), "max_steps": 1}
    with pytest.raises(TrainingError, match="5 tokens there, 7 here; 3 compression tokens there, 5 here"):
        train(config_of(tiny_model("qwen3"), compression_tokens=5, **start), examples(20), teacher=Letters(),
              out=tmp_path / "out")  # fmt: skip
    with pytest.raises(TrainingError, match="6 components there, 4 here"):
        train(config_of(tiny_model("qwen3"), **start), examples(20), teacher=Letters(4), out=tmp_path / "out")
    with pytest.raises(TokenSetMismatchError, match="trained on '.*qwen3.*', the model is '.*llama"):
        train(config_of(tiny_model("llama"), **start), examples(20), teacher=Letters(), out=tmp_path / "out")


@pytest.mark.parametrize("weight", ["reconstruction_weight", "alignment_weight"])
def test_one_term_alone(tiny_model: Any, tmp_path: Path, weight: str) -> None:
    config = config_of(tiny_model("qwen3"), **{weight: 0.0}, thought_tokens=0, compression_tokens=1, max_steps=3)
    token_set = train(config, examples(30), teacher=Letters(), out=tmp_path / "out")
    assert token_set.rows.shape == (1, 32)
    name = "alignment" if weight == "reconstruction_weight" else "reconstruction"
    assert curve(tmp_path / "out") == curve(tmp_path / "out", name)


def test_the_teacher_may_be_the_backbone_itself(tiny_model: Any, tmp_path: Path) -> None:
    token_set = train(config_of(tiny_model("qwen3"), max_steps=1), examples(20), teacher="echo", out=tmp_path / "out")
    assert token_set.dimension == 32 and token_set.teacher == f"echo:{tiny_model('qwen3')}"


def test_tensorboard(tiny_model: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = config_of(tiny_model("qwen3"), max_steps=2, report_to="tensorboard")
    train(config, examples(20), teacher=Letters(), out=tmp_path / "out")
    events = list((tmp_path / "out.training").rglob("events.out.tfevents*"))
    assert events and b"alignment" in events[0].read_bytes()


def test_bad_data_is_refused_before_anything_is_trained(tiny_model: Any, tmp_path: Path) -> None:
    rows = [*examples(10), Example("how do I reset the pump?", " \n")]
    with pytest.raises(InputError, match="'how do I reset the pump.'.* has no response"):
        train(config_of(tiny_model("qwen3"), validation_examples=0), rows, teacher=Letters(), out=tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="holds something else"):
        train(config_of(tiny_model("qwen3")), examples(20), teacher=Letters(), out=tmp_path / "full")
    assert not list(tmp_path.glob("*.training"))


def test_data_may_be_a_file_and_long_queries_are_cut(tiny_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"query": "pump " * 900 + str(i), "response": "valve " * 900 + str(i)} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = config_of(tiny_model("qwen3"), max_steps=1, max_query_length=20, max_response_length=10)
    train(config, path, teacher=Letters(), out=tmp_path / "out")
    assert len(curve(tmp_path / "out")) == 1


def test_configuration(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: echo-mini\nlearning_rate: 5e-4\nlora: {r: 32, alpha: 64}\n", encoding="utf-8")
    config = TrainingConfig.from_yaml(path)
    assert (config.learning_rate, config.lora) == (5e-4, LoraSettings(r=32, alpha=64))
    with pytest.raises(ValidationError, match="learning_rat"):
        TrainingConfig(learning_rat=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        config.learning_rate = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="equal parts"):
        TrainingConfig(batch_size=10, gradient_accumulation_steps=4)
    path.write_text("- a\n", encoding="utf-8")
    with pytest.raises(InputError, match="name: value"):
        TrainingConfig.from_yaml(path)


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_every_order_takes_the_same_examples_at_each_step(processes: int, parts: int) -> None:
    whole = [sorted(batch) for batch in Order(10, 8, 5, 3)]
    shares = [list(Order(10, 8, 5, 3, parts=parts, processes=processes, rank=rank)) for rank in range(processes)]
    assert all(len(share) == 5 * parts for share in shares)
    for step in range(5):
        taken = [i for share in shares for part in share[step * parts : (step + 1) * parts] for i in part]
        assert sorted(taken) == whole[step]
    assert sorted([i for batch in Order(10, 5, 2, 3) for i in batch]) == list(range(10))
