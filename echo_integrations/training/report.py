"""`write_report`: what a training did, as one page that a person would rather look at than a log.

The page stands alone: pictures are inside, nothing is fetched and no script runs. Beside it lie the same pictures as
PNG and the history as JSON Lines. The same input gives the same bytes. This module knows nothing of models.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_integrations.config import InputError
from echo_integrations.files import writing
from echo_integrations.training import figures
from echo_integrations.training.figures import History
from echo_integrations.training.page import page

FILES = ("loss.png", "validation.png", "similarity.png", "history.jsonl", "index.html")
"""What a report consists of; a picture is missing where there is nothing to draw."""

_CELLS = 96  # queries that a heat map shows


def write_report(
    folder: Path,
    history: History,
    *,
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    data: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    similarities: Mapping[str, NDArray[np.float32]] | None = None,
) -> Path:
    """Write ``index.html``, its pictures as PNG and ``history.jsonl``; each replaces its forerunner as a whole.

    Args:
        folder: where; made at need. Other files in it stay.
        history: rows with ``step`` and any of ``loss``, ``reconstruction``, ``alignment``, ``margin``,
            ``contrastive``, ``learning_rate`` and, measured on held-out queries, ``validation_cosine``,
            ``validation_recall_at_1`` and others that begin like these. Values that are not finite are left out of
            the curves, counted on the page, and null in ``history.jsonl``.
        config: the exact configuration; ``model`` and ``teacher`` head the page.
        versions: of the software.
        data: what it was trained on: files, hashes, counts.
        samples: rows of ``step``, ``query``, ``response`` and ``decoded``: what embeddings of held-out queries said.
        similarities: cosines (n, n) of held-out queries and responses, ``before``, ``after`` and of the ``teacher``.
            Each query's own response is on the diagonal.

    Returns:
        The path of ``index.html``.

    Raises:
        InputError: a matrix is not square, not of the others' size, or of an unknown name.
        ModuleNotFoundError: matplotlib is not installed.
        FileError: the folder cannot be written; what was there stays.

    Example:
        >>> import tempfile
        >>> history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "validation_cosine": 0.5}]
        >>> with tempfile.TemporaryDirectory() as place:
        ...     page = write_report(
        ...         Path(place), history, config={"model": "echo-mini"}, versions={}, data={}, samples=[]
        ...     )
        ...     sorted(path.name for path in page.parent.iterdir())
        ['history.jsonl', 'index.html', 'loss.png', 'validation.png']
    """
    matrices = _ordered(similarities or {})
    with figures.style():
        curves = {"loss": figures.loss_figure(history), "validation": figures.validation_figure(history)}
        drawn = {name: figure for name, figure in curves.items() if figure}
        contents = {f"{name}.png": figures.png(figure) for name, figure in drawn.items()}
        if matrices:
            contents["similarity.png"] = figures.png(figures.similarity_figure(matrices, _CELLS))
        html = page(
            history,
            config=config,
            versions=versions,
            data=data,
            samples=samples,
            curves={name: figures.svg(figure, f"{name} by step", name) for name, figure in drawn.items()},
            matrices=matrices,
            cells=_CELLS,
        )
    rows = [json.dumps({key: _finite(value) for key, value in row.items()}) + "\n" for row in history]
    contents |= {"history.jsonl": "".join(rows).encode(), "index.html": html.encode(errors="replace")}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".report.") as work:
            for name, content in contents.items():
                (Path(work) / name).write_bytes(content)
            for name in contents:
                (Path(work) / name).replace(folder / name)
        for name in set(FILES) - contents.keys():
            (folder / name).unlink(missing_ok=True)
    return folder / "index.html"


def _ordered(similarities: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    known = ("before", "after", "teacher")
    shapes = {key: matrix.shape for key, matrix in similarities.items()}
    if shapes.keys() - set(known):
        raise InputError(f"similarities are {', '.join(known)}; here are {', '.join(shapes)}")
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 or shape[0] != shape[1] for shape in shapes.values()):
        raise InputError(f"similarities are square and of one size, queries x their responses; here are {shapes}")
    return {key: similarities[key] for key in known if key in similarities and similarities[key].size}


def _finite(value: Any) -> Any:
    """A number as JSON has it."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
