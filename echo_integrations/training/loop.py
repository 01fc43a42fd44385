"""The loop itself: Hugging Face's `Trainer` around a `Student`. Knows nothing of files beyond its checkpoints."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from echo_integrations.training.batches import Examples, Order
from echo_integrations.training.config import TrainingConfig, TrainingError
from echo_integrations.training.model import Batch, Student

MARK = "run.json"
"""Written last into a checkpoint: one without it was not finished."""

BEST = "best.safetensors"
"""The student at its best validation, beside the checkpoints."""

Metrics = dict[str, float]


def best_of(values: Sequence[float], metric: str) -> int:
    """Index of the best value of a validation metric, the first of equals.

    Example:
        >>> best_of([0.1, 0.3, 0.2], "validation_cosine"), best_of([3.0, 1.0, 2.0], "validation_reconstruction")
        (1, 1)
    """
    choose = min if metric == "validation_reconstruction" else max
    return values.index(choose(values))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written in full."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{MARK}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@contextmanager
def stopping(loop: Loop) -> Iterator[None]:
    """Meanwhile the first Ctrl-C or SIGTERM lets the step end and a checkpoint be written; a second one does not wait.

    Outside the main thread, where Python takes no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, frame: Any) -> None:
        loop.stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def schedule(config: TrainingConfig) -> Callable[[int], float]:
    """Factor on the learning rate by step: a rise, then a linear decay that training may stop long before the end of.

    Example:
        >>> factor = schedule(TrainingConfig(warmup_steps=100, decay_steps=300))
        >>> [factor(step) for step in (0, 50, 100, 200, 300)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warmup, end = config.warmup_steps, max(config.decay_steps, config.warmup_steps + 1)
    return lambda step: step / warmup if step < warmup else max(0.0, (end - step) / (end - warmup))


def optimizer(student: Student, config: TrainingConfig) -> torch.optim.Adam:
    """Adam, with the learning rate of the rows apart."""
    others = [p for name, p in student.named_parameters() if name != "rows" and p.requires_grad]
    rows_rate = config.rows_learning_rate or config.learning_rate
    groups: list[dict[str, Any]] = [{"params": [student.rows], "lr": rows_rate}, {"params": others}]
    return torch.optim.Adam(groups, lr=config.learning_rate)


class Loop(Trainer):
    """Runs the steps, exactly the same whatever the number of processes and parts of a batch.

    Args:
        student: what is trained.
        examples: what on.
        config: how.
        arguments: of transformers.
        record: what a checkpoint keeps of its run, to be compared when it is resumed.
        validate: gives the metrics of the moment, or None for no validation.
    """

    def __init__(
        self,
        student: Student,
        examples: Examples,
        config: TrainingConfig,
        arguments: TrainingArguments,
        record: Mapping[str, Any],
        validate: Callable[[int], Metrics] | None,
    ) -> None:
        adam = optimizer(student, config)
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=examples,
            optimizers=(adam, LambdaLR(adam, schedule(config))),
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_Steps(self, config, validate is not None))
        self._examples, self._config, self._record, self._measure = examples, config, record, validate
        self._student, self._folder = student, Path(str(arguments.output_dir))
        self.stop = threading.Event()  # set: write a checkpoint after the step under way, and end
        self.stopped = False
        self._labels = 1
        self._sums: dict[str, torch.Tensor] = {}
        self._since = 0
        self.current: list[int] = []  # the examples of the step under way

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Each process's share of every step, in the one order that there is."""
        args, config = self.args, self._config
        order = Order(
            len(self._examples),
            config.batch_size,
            config.max_steps,
            config.seed,
            parts=config.gradient_accumulation_steps,
            processes=args.world_size,
            rank=args.process_index,
        )
        collate = lambda indices: {"batch": self._examples.batch(indices)}  # noqa: E731
        loader: DataLoader[Any] = DataLoader(self._examples, batch_sampler=order, collate_fn=collate)  # type: ignore
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The parts of a step, and how many labels there are in it over all processes."""
        parts, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        labels = torch.tensor(sum(part["batch"].labels for part in parts), device=device)
        self._labels = int(self.accelerator.reduce(labels, reduction="sum"))
        self.current = [i for part in parts for i in part["batch"].indices]
        return parts, None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        """The part's share of the step's loss.

        Sums are divided by the labels or examples of the whole step; what averages over processes and divides by
        the number of parts later is undone here.
        """
        batch: Batch = inputs["batch"]
        terms = model(batch)
        loss = torch.zeros((), device=self.args.device)
        for name, value in terms.items():
            value = value / (self._labels if name == "reconstruction" else self._config.batch_size)
            loss = loss + getattr(self._config, f"{name}_weight") * value
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        if not torch.isfinite(loss):
            found = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
            raise self.failure(f"the loss is not finite ({found})", batch.indices)
        loss = loss * self.args.world_size * len(self.current) / len(batch.indices)
        return (loss, terms) if return_outputs else loss

    def failure(self, what: str, indices: list[int]) -> TrainingError:
        """An error that names the batch and what is left."""
        last = last_checkpoint(self._folder)
        return TrainingError(
            f"step {self.state.global_step + 1}: {what} in the batch of examples {sorted(indices)}; training stopped, "
            + (f"the last good checkpoint is {last}" if last else "before the first checkpoint")
            + ": look at these examples, lower learning_rate or take dtype='float32'"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As always, with the loss terms beside the loss, averaged over the same steps."""
        if "loss" in logs and self._sums:
            steps = self.state.global_step - self._since
            for name, value in self._sums.items():
                logs[name] = float(self.accelerator.reduce(value, reduction="sum")) / max(1, steps)
            self._sums, self._since = {}, self.state.global_step
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> Metrics:
        """Measure on the held-out examples; the same numbers in every process."""
        metrics = self._measure(self.state.global_step) if self._measure and self.is_world_process_zero() else {}
        if self.args.world_size > 1:
            shared = [metrics]
            torch.distributed.broadcast_object_list(shared, src=0)
            metrics = shared[0]
        self.log(dict(metrics))
        metric = self._config.early_stopping_metric
        values = [row[metric] for row in self.state.log_history if metric in row]
        if self._config.early_stopping_patience is not None and best_of(values, metric) == len(values) - 1:
            if self.is_world_process_zero():
                save_file(self._student.state_dict(), self._folder / BEST)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Whole or not at all."""
        folder = self._folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.is_world_process_zero():
                (folder / f".{MARK}").write_text(json.dumps(self._record), encoding="utf-8")
                (folder / f".{MARK}").replace(folder / MARK)
        except Exception as error:  # OSError, safetensors' own or torch's RuntimeError: there is no common base
            shutil.rmtree(folder, ignore_errors=True)
            last = last_checkpoint(self._folder)
            raise TrainingError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {folder.parent} "
                f"({type(error).__name__}: {error}): is the disk full? "
                + (f"{last} stays; make room and run the same again to go on from it" if last else "make room")
            ) from error


class _Steps(TrainerCallback):
    """What happens around each step: finite gradients, progress, interruption, validation, early stopping."""

    def __init__(self, loop: Loop, config: TrainingConfig, validates: bool) -> None:
        self._loop, self._config, self._validates = loop, config, validates
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            disable=None if state.is_local_process_zero else True,
        )
        self._loop._since = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self._loop._student.parameters() if p.grad is not None]
        if not torch.stack([gradient.norm() for gradient in gradients]).isfinite().all():
            raise self._loop.failure("the gradient is not finite", self._loop.current)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()
        last = state.global_step >= state.max_steps
        control.should_save |= last
        control.should_evaluate = self._validates and (last or state.global_step % self._config.validate_every == 0)
        if self._stop_asked():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {key: f"{logs[key]:.4g}" for key in ("loss", "validation_cosine") if key in (logs or {})}
        if shown and self._bar is not None:
            self._bar.set_postfix(shown)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        patience, metric = self._config.early_stopping_patience, self._config.early_stopping_metric
        if patience is None:
            return
        values = [row[metric] for row in state.log_history if metric in row]
        best = best_of(values, metric)
        if len(values) - 1 - best >= patience:
            control.should_training_stop = control.should_save = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()

    def _stop_asked(self) -> bool:
        asked = self._loop.stop.is_set()
        if self._loop.args.world_size > 1:
            flag = torch.tensor(int(asked), device=self._loop.args.device)
            asked = bool(self._loop.accelerator.reduce(flag, reduction="sum"))
        self._loop.stopped = asked
        return asked
