"""`train`: from examples and a teacher to a token set, with checkpoints on the way and a report at the end.

Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import TrainingArguments

from echo_integrations import __version__
from echo_integrations.backbone import Backbone, BackboneSpec, load
from echo_integrations.checkpoint import Checkpoint, Place
from echo_integrations.config import BUILT_IN_MODEL, InputError, Role
from echo_integrations.device import choose_device
from echo_integrations.encoder import Encoder
from echo_integrations.registry import registry
from echo_integrations.token_set import HEADER, TokenSet
from echo_integrations.training.batches import Examples
from echo_integrations.training.config import TrainingConfig, TrainingError
from echo_integrations.training.data import Example, data_hash, read_examples, split
from echo_integrations.training.loop import BEST, MARK, Loop, last_checkpoint, stopping
from echo_integrations.training.model import Student
from echo_integrations.training.report import write_report
from echo_integrations.training.teacher import Teacher, TeacherVectors, as_teacher
from echo_integrations.training.validation import Validation

logger = logging.getLogger(__name__)

_SAMPLE = 4096  # examples that decide where the alignment map starts and how the teacher is scaled


def train(
    config: TrainingConfig,
    data: Sequence[Example] | str | Path,
    *,
    teacher: Any,
    out: str | Path,
    resume: bool = True,
) -> TokenSet:
    """Train a token set and save it, with a report in it.

    Checkpoints are kept in ``<out>.training``; the same call again goes on from the last one, to the same result.
    Ctrl-C lets the step under way end and writes one. Under ``accelerate launch`` every process makes the same call.

    Args:
        config: the settings.
        data: examples, or the path of a file that `read_examples` reads.
        teacher: what `as_teacher` takes, or ``"echo"`` for echo embeddings of the backbone itself.
        out: folder for the token set with ``report`` in it: new, empty, or holding a token set, which is replaced.
        resume: whether to go on from the last checkpoint, if there is one; else it is deleted.

    Returns:
        The token set, as it was saved.

    Raises:
        InputError: bad data, or a place that holds something else.
        TrainingError: the loss became NaN or infinite, a checkpoint could not be written, or the one that is there
            belongs to another run.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
        ModuleNotFoundError: an extra is not installed.

    Example:
        >>> import tempfile
        >>> pairs = [("how do I reset the pump?", "Hold the green button."), ("when is the filter due?", "In spring.")]
        >>> config = TrainingConfig(max_steps=2, batch_size=2, validation_examples=0, report=False)
        >>> out = Path(tempfile.mkdtemp()) / "pump"
        >>> train(config, [Example(*pair) for pair in pairs], teacher="echo", out=out).dimension
        256
        >>> Encoder(mode="llm2vec-gen", token_set=out).encode_query("how do I reset the pump?").shape
        (256,)
    """
    out = Path(out)
    _check_extras(config)
    _check_place(out)
    work = out.with_name(f"{out.name}.training")
    examples = list(data) if not isinstance(data, str | Path) else read_examples(data)
    arguments = _arguments(config, work)
    settings = config.settings()
    checkpoint = Checkpoint.find(settings)
    spec = BackboneSpec.of(settings, checkpoint)
    backbone = load(spec) if config.lora else registry.acquire(spec, settings)
    try:
        return _Run(config, examples, teacher, out, work, arguments, backbone).run(resume)
    finally:
        registry.release(settings)


class _Run:
    """One call of `train`, with what its steps share."""

    def __init__(
        self,
        config: TrainingConfig,
        examples: list[Example],
        teacher: Any,
        out: Path,
        work: Path,
        arguments: TrainingArguments,
        backbone: Backbone,
    ) -> None:
        self.config, self.out, self.work, self.arguments = config, out, work, arguments
        self.checkpoint = backbone.spec.checkpoint
        self.teacher = _teacher(teacher, config)
        self.hash = data_hash(examples)
        training, held_out = split(examples, config.validation_examples, config.seed)
        folder = Path(config.teacher_folder) if config.teacher_folder else out.parent / "teacher-vectors"
        with arguments.main_process_first(local=False, desc="teacher"):
            self.vectors = TeacherVectors(self.teacher, folder / self.teacher.fingerprint[:32])
            place = (self.checkpoint.tokenizer, self.checkpoint.positions, self.vectors, config)
            self.examples, self.held_out = Examples(training, *place), Examples(held_out, *place)
            if held_out:
                self.vectors.add([example.query.strip() for example in held_out])
        if not training:
            raise InputError("there is no example to train on: give some, or lower validation_examples")
        self.student = Student(backbone, self.vectors.dimension, config)
        self.start = None if config.start_from is None else TokenSet.load(config.start_from)
        if self.start is not None:
            self.start.check(self.checkpoint)
        self.validation = Validation(self.student, self.held_out, config.samples) if held_out else None

    def run(self, resume: bool) -> TokenSet:
        record, last = self._record(), self._resumed(resume)
        if last is not None:
            _compare(json.loads((last / MARK).read_text(encoding="utf-8")), record, self.out)
        self._start()
        before = self.validation.cosines() if self.validation and self.config.report else None
        loop = Loop(self.student, self.examples, self.config, self.arguments, record, self.validation)
        try:
            with stopping(loop):
                loop.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            self.student.eval()
        if loop.stopped:
            message = (
                f"stopped after step {loop.state.global_step} of {self.config.max_steps}; the checkpoint is in "
                f"{self.work}: make the same call again to go on from it"
            )
            logger.warning(message)
            raise KeyboardInterrupt(message)
        return self._finish(loop, before)

    def _start(self) -> None:
        """What depends on the data before the first step."""
        count = min(_SAMPLE, len(self.examples))
        if self.config.teacher_scale == "unit":
            power = self.examples.targets(range(count)).square().mean().item()
            factor = power**-0.5
        else:
            factor = float(self.config.teacher_scale)
        self.examples.scale_targets(factor)
        if self.start is not None:
            self.student.start_from(self.start)
        elif self.config.alignment_init == "ridge":
            starts = range(0, count, 64)
            self.student.fit_alignment(
                self.examples.batch(range(start, min(start + 64, count)), extras=False) for start in starts
            )

    def _finish(self, loop: Loop, before: NDArray[Any] | None) -> TokenSet:
        """Save the result and the report, in one process; the same token set in all."""
        history = [
            {key: value for key, value in row.items() if key != "epoch"}
            for row in loop.state.log_history
            if "train_runtime" not in row
        ]
        if self.config.early_stopping_patience is not None:
            self.student.load_state_dict(load_file(self.work / BEST))
        metrics = self.validation(loop.state.global_step) if self.validation else {}
        data = {"hash": self.hash, "examples": len(self.examples), "validation": len(self.held_out)}
        token_set = self.student.token_set(
            backbone=_lasting(self.config.model),
            revision=self.checkpoint.revision,
            backbone_identity=self.checkpoint.identity(),
            instructions={**(self.start.instructions if self.start else {}), **_instructions(self.config)},
            teacher=self.teacher.name,
            training={
                "config": self.config.outcome(),
                "teacher": {"name": self.teacher.name, "fingerprint": self.teacher.fingerprint},
                "data": data,
                "steps": loop.state.global_step,
                "metrics": metrics,
                "versions": _versions(),
            },
        )
        if loop.is_world_process_zero():
            token_set.save(self.out)
        if loop.is_world_process_zero() and self.config.report:
            similarities = None
            if self.validation and before is not None:
                similarities = {"before": before, "after": self.validation.cosines(), "teacher": self._of_teacher()}
            write_report(
                self.out / "report",
                history,
                config={**self.config.model_dump(mode="json"), "teacher": self.teacher.name},
                versions=_versions(),
                data=data,
                samples=self.validation.samples if self.validation else [],
                similarities=similarities,
            )
        loop.accelerator.wait_for_everyone()
        return token_set

    def _of_teacher(self) -> NDArray[Any]:
        """(n, n) cosines of the same queries and responses, both embedded by the teacher."""
        texts = self.held_out.texts[:256]
        queries = torch.from_numpy(self.vectors[[example.query.strip() for example in texts]])
        scores = normalize(queries, dim=1) @ normalize(self.held_out.targets(range(len(texts))), dim=1).T
        result: NDArray[Any] = scores.numpy()
        return result

    def _record(self) -> dict[str, Any]:
        """What two runs must have in common for one to go on where the other ended, as JSON has it."""
        record = {
            "backbone": {"name": self.config.model, "identity": self.checkpoint.identity()},
            "teacher": {"name": self.teacher.name, "fingerprint": self.teacher.fingerprint},
            "dimension": self.vectors.dimension,
            "data": self.hash,
            "config": self.config.outcome(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(record))
        return plain

    def _resumed(self, resume: bool) -> Path | None:
        """The checkpoint to go on from; what else is there is cleared away."""
        with self.arguments.main_process_first(local=False, desc="checkpoints"):
            last = last_checkpoint(self.work) if resume else None
            if self.arguments.process_index == 0:
                if last is None and self.work.exists():
                    shutil.rmtree(self.work)
                for unfinished in self.work.glob("checkpoint-*"):
                    if not (unfinished / MARK).is_file():
                        shutil.rmtree(unfinished)
                self.work.mkdir(parents=True, exist_ok=True)
        return last


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], out: Path) -> None:
    """Refuse to resume another run.

    Raises:
        TrainingError: the message names both and the remedy.
    """
    differences = []
    if old["backbone"]["identity"] != new["backbone"]["identity"]:
        differences.append(f"the backbone ({old['backbone']['name']!r} there, {new['backbone']['name']!r} here)")
    if old["dimension"] != new["dimension"]:
        differences.append(f"the teacher's dimension ({old['dimension']} there, {new['dimension']} here)")
    if old["teacher"]["fingerprint"] != new["teacher"]["fingerprint"]:
        there, here = ("{name!r}, fingerprint {fingerprint}".format(**run["teacher"]) for run in (old, new))
        differences.append(f"the teacher ({there}, there; {here}, here)")
    if old["data"] != new["data"]:
        differences.append(f"the data (hash {old['data'][:12]} there, {new['data'][:12]} here)")
    for name in sorted(old["config"].keys() | new["config"].keys()):
        there, here = old["config"].get(name), new["config"].get(name)
        if there != here:
            differences.append(f"{name} ({there!r} there, {here!r} here)")
    if differences:
        raise TrainingError(
            f"the checkpoints of {out} belong to another run, they differ in {'; '.join(differences)}: "
            "name another place as out, or pass resume=False to delete them and start anew"
        )


def _teacher(teacher: Any, config: TrainingConfig) -> Teacher:
    if teacher == "echo":
        settings = config.settings()
        own = {name: getattr(settings, name) for name in ("revision", "trust_remote_code", "device", "dtype")}
        attention = config.attn_implementation
        teacher = Encoder(model=config.model, attn_implementation=attention, on_truncate="truncate", **own)
    return as_teacher(teacher)


def _instructions(config: TrainingConfig) -> dict[Role, str]:
    given = {Role.QUERY: config.query_instruction, Role.DOCUMENT: config.document_instruction}
    return {role: text for role, text in given.items() if text is not None}


def _lasting(model: str) -> str:
    """A local folder by its absolute path, so that the set finds it from elsewhere; a name as it is."""
    folder = Place.local(model)
    return model if folder is None or model == BUILT_IN_MODEL else str(folder.resolve())


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate")
    own = {"python": platform.python_version(), "echo-integrations": __version__}
    return own | {name: version(name) for name in names}


def _arguments(config: TrainingConfig, work: Path) -> TrainingArguments:
    """Transformers' words for the settings.

    Raises:
        InputError: a batch that cannot be shared by the processes, or a GPU that is not the process's own.
    """
    device = choose_device(config.device)
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,  # batches are made by Order
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_steps=config.max_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=2,
        report_to=config.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one GPU a process: several are for accelerate launch
    if config.device is not None and arguments.device.type == "cuda" and device != arguments.device:
        raise InputError(
            f"device={config.device!r} is not the one that training runs on, {arguments.device}: leave device out, and "
            "choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    parts = arguments.world_size * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise InputError(
            f"batch_size={config.batch_size} cannot be shared by {arguments.world_size} processes in "
            f"{config.gradient_accumulation_steps} parts each: make it a multiple of {parts}"
        )
    return arguments


def _check_place(out: Path) -> None:
    """See now, not after hours, that the result can be saved there.

    Raises:
        InputError: something else is there.
    """
    if out.exists() and not (out.is_dir() and ((out / HEADER).is_file() or not any(out.iterdir()))):
        raise InputError(f"{out} holds something else than a token set: choose another place")
    if not os.access(next(place for place in (out, *out.absolute().parents) if place.exists()), os.W_OK):
        raise InputError(f"{out} cannot be written: choose another place")


def _check_extras(config: TrainingConfig) -> None:
    """See now that the report can be drawn.

    Raises:
        ModuleNotFoundError: an extra is not installed.
    """
    needed = ["matplotlib"] if config.report else []
    if "tensorboard" in ([config.report_to] if isinstance(config.report_to, str) else config.report_to):
        needed.append("tensorboard")
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f'training needs {name}: pip install "echo-integrations[train]"', name=name)
