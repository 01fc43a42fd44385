"""Training token sets: fit a domain's tokens from unlabelled queries.

Importing this package loads neither torch nor a framework; each name below is imported when it is first used.

Example:
    >>> from echo_integrations.training import TrainingConfig
    >>> TrainingConfig().max_steps
    5000
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echo_integrations.training.config import LoraSettings as LoraSettings
    from echo_integrations.training.config import TrainingConfig as TrainingConfig
    from echo_integrations.training.config import TrainingError as TrainingError
    from echo_integrations.training.data import DataWarning as DataWarning
    from echo_integrations.training.data import Example as Example
    from echo_integrations.training.data import data_hash as data_hash
    from echo_integrations.training.data import read_examples as read_examples
    from echo_integrations.training.data import read_queries as read_queries
    from echo_integrations.training.data import read_rows as read_rows
    from echo_integrations.training.data import split as split
    from echo_integrations.training.evaluation import evaluate as evaluate
    from echo_integrations.training.evaluation import read_qrels as read_qrels
    from echo_integrations.training.evaluation import read_texts as read_texts
    from echo_integrations.training.evaluation import retrieve as retrieve
    from echo_integrations.training.evaluation import spearman as spearman
    from echo_integrations.training.report import write_report as write_report
    from echo_integrations.training.responses import Responded as Responded
    from echo_integrations.training.responses import respond as respond
    from echo_integrations.training.teacher import Teacher as Teacher
    from echo_integrations.training.teacher import TeacherVectors as TeacherVectors
    from echo_integrations.training.teacher import as_teacher as as_teacher
    from echo_integrations.training.trainer import train as train

_HOMES = {
    **dict.fromkeys(("LoraSettings", "TrainingConfig", "TrainingError"), "config"),
    **dict.fromkeys(
        ("DataWarning", "Example", "data_hash", "read_examples", "read_queries", "read_rows", "split"), "data"
    ),
    **dict.fromkeys(("evaluate", "read_qrels", "read_texts", "retrieve", "spearman"), "evaluation"),
    "write_report": "report",
    **dict.fromkeys(("Responded", "respond"), "responses"),
    **dict.fromkeys(("Teacher", "TeacherVectors", "as_teacher"), "teacher"),
    "train": "trainer",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
