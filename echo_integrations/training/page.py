"""The report's page: HTML from numbers and texts. Every text that comes from outside is escaped, nothing is fetched.

This module writes no files and draws nothing but the pixels of the heat maps.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from echo_integrations.training import figures
from echo_integrations.training.figures import Agreement, History, cosine, number, value

Matrices = Mapping[str, NDArray[np.float32]]

_LETTERS = 300  # of a text in the table
_MEANINGS = {
    "before": "With untrained tokens.",
    "after": "With the trained tokens.",
    "teacher": "The teacher's own vectors: what was to be learnt.",
}
_CURVES = {
    "loss": "Strong: the mean over a twentieth of the run around each step. Faint: the logged values.",
    "validation": "Measured on held-out queries while training. The ring marks the best value of each.",
}


def page(
    history: History,
    *,
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    data: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    curves: Mapping[str, str],
    matrices: Matrices,
    cells: int,
) -> str:
    """The whole page.

    Args:
        history: as for `echo_integrations.training.report.write_report`, as are the next four.
        config: the exact configuration.
        versions: of the software.
        data: what it was trained on.
        samples: decoded readings.
        curves: SVG elements ``loss`` and ``validation``, where there are any.
        matrices: cosines by name, in the order to show them.
        cells: queries that a heat map shows at most, the first ones.
    """
    title = f"Training of a token set for {_first(config, 'model', 'model_name', 'backbone') or 'a language model'}"
    boxes = "".join(f"<figure>{svg}<figcaption>{_CURVES[key]}</figcaption></figure>" for key, svg in curves.items())
    parts = [
        _header(history, config),
        _section("Curves", "", f'<div class="curves">{boxes}</div>') if boxes else "",
        _heat_maps(matrices, cells) if matrices else "",
        _readings(samples) if samples else "",
        _record(history, config, data, versions),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>
{_css()}</style>
</head>
<body>
{"".join(parts)}
<footer>Beside this page: the raw numbers in <code>history.jsonl</code> and the pictures as PNG.</footer>
</body>
</html>
"""


def _css() -> str:
    text = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    for place, theme in enumerate(("light", "dark")):
        colours = " ".join(f"--{key}: {pair[place]};" for key, pair in figures.COLOURS.items())
        text = text.replace(f"%{theme}%", colours)
    return text


def _header(history: History, config: Mapping[str, Any]) -> str:
    model = _first(config, "model", "model_name", "backbone") or "a language model"
    steps = max((int(row["step"]) for row in history), default=0)
    planned = config.get("max_steps")
    tokens = [f"{config[f'{kind}_tokens']} {kind}" for kind in ("thought", "compression") if f"{kind}_tokens" in config]
    facts = {
        "Teacher": _first(config, "teacher"),
        "Trained tokens": ", ".join(tokens),
        "Steps": f"{steps:,}" + (f" of {planned:,}" if isinstance(planned, int) and planned > steps else ""),
        "Seed": _first(config, "seed"),
    }
    items = (f"<div><dt>{key}</dt><dd>{escape(text)}</dd></div>" for key, text in facts.items() if text)
    tiles = "".join(_tile(history, key) for key in [*figures.validation_keys(history), *figures.TERMS])
    return f"""<header>
<p class="kind">Training report of an LLM2Vec-Gen token set</p>
<h1>{escape(model)}</h1>
<p class="lede">{escape(_summary(history))}</p>
<dl class="facts">{"".join(items)}</dl>
{_warning(history)}
<dl class="tiles">{tiles}</dl>
</header>
"""


def _summary(history: History) -> str:
    """The outcome in a sentence or two."""
    steps, losses = figures.series(history, "loss")
    said = []
    if len(steps) > 1:
        said.append(f"The loss went from {number(losses[0])} to {number(_tail(losses)[0])} in {steps[-1]:,} steps.")
    _, cosines = figures.series(history, "validation_cosine")
    measured, found = figures.series(history, "validation_recall_at_1")
    if len(cosines) and len(found):
        said.append(
            f"On held-out queries the embedding now has a cosine of {cosines[-1]:.2f} to the teacher's vector of the "
            f"response, and {found[-1]:.0%} find their own response first"
            + (f" ({cosines[0]:.2f} and {found[0]:.0%} at step {measured[0]:,})." if len(found) > 1 else ".")
        )
    return " ".join(said) or "Too short a training to say how it went."


def _warning(history: History) -> str:
    bad = [row for row in history if any(value is not None and not math.isfinite(value) for value in row.values())]
    if not bad:
        return ""
    return (
        f'<p class="warning"><strong>Not every number is finite.</strong> {len(bad):,} of {len(history):,} rows hold '
        f"NaN or infinity, the first at step {int(bad[0]['step']):,}. The curves leave these values out.</p>"
    )


def _tile(history: History, key: str) -> str:
    steps, values = figures.series(history, key)
    if not len(values):
        return ""
    last, count = (values[-1], 1) if key.startswith("validation_") else _tail(values)
    notes = [f"from {value(key, values[0])}"] if len(values) > 1 else []
    best = figures.best(key, values)
    if key.startswith("validation_") and value(key, values[best]) != value(key, last):
        notes.append(f"best {value(key, values[best])} at step {steps[best]:,}")
    if count > 1:
        notes.append(f"mean of the last {count} values")
    return (
        f'<div class="tile"><dt>{escape(figures.name(key))}</dt><dd class="value">{value(key, last)}</dd>'
        f'<dd class="note">{", ".join(notes)}</dd></div>'
    )


def _tail(values: NDArray[np.float64]) -> tuple[float, int]:
    """The mean of the last twentieth, as one batch says little, and how many values these are."""
    count = max(1, len(values) // 20)
    return float(values[-count:].mean()), count


def _heat_maps(matrices: Matrices, cells: int) -> str:
    shown = {key: matrix[:cells, :cells] for key, matrix in matrices.items()}
    low, high = figures.bounds(shown.values())
    total = len(next(iter(matrices.values())))
    which = f"the first {cells} of {total:,} held-out queries" if total > cells else f"the {total:,} held-out queries"
    boxes = []
    for key, matrix in matrices.items():
        agreement = Agreement.of(matrix)
        pixels = base64.b64encode(figures.heat_map(shown[key], low, high)).decode()
        own, others = cosine(agreement.own), cosine(agreement.others)
        alt = f"{figures.name(key)}: heat map of cosines; mean on the diagonal {own}, elsewhere {others}"
        first = "–" if math.isnan(agreement.first) else f"{agreement.first:.0%}"
        boxes.append(
            f'<figure><h3>{figures.name(key)}</h3><img src="data:image/png;base64,{pixels}" alt="{alt}">'
            f"<dl><dt>own response, mean</dt><dd>{own}</dd><dt>other responses, mean</dt><dd>{others}</dd>"
            f"<dt>own response nearest</dt><dd>{first}</dd></dl><figcaption>{_MEANINGS[key]}</figcaption></figure>"
        )
    about = (
        f"Cosines of {which}, one per row, with the teacher's vectors of all their responses, one per column. "
        "A query's own response is on the diagonal: a bright diagonal on dark ground is what training is for."
    )
    scale = (
        f'<p class="scale">{cosine(low)}<i style="background: linear-gradient(to right, '
        f'{", ".join(figures.colour_stops())})"></i>{cosine(high)}</p>'
    )
    return _section("Similarity", about, f'{scale}<div class="maps">{"".join(boxes)}</div>')


def _readings(samples: Sequence[Mapping[str, Any]]) -> str:
    """A row per query: what its embedding said first and last, and what it should say."""
    by_query: dict[tuple[str, str], dict[int, str]] = {}
    for sample in samples:
        readings = by_query.setdefault((str(sample["query"]), str(sample["response"])), {})
        readings[int(sample["step"])] = str(sample["decoded"])
    steps = sorted({step for readings in by_query.values() for step in readings})
    columns = [(f"Read at step {step:,}", step) for step in dict.fromkeys((steps[0], steps[-1]))]
    heads = ["Query", *(label for label, _ in columns), "The response"]
    rows = []
    for (query, response), readings in by_query.items():
        cells = [(label, readings.get(step)) for label, step in columns] + [("The response", response)]
        rows.append(_row("th", query, "") + "".join(_row("td", text, label) for label, text in cells))
    head = "".join(f'<th role="columnheader" scope="col">{text}</th>' for text in heads)
    body = "".join(f'<tr role="row">{row}</tr>' for row in rows)
    table = (
        f'<div class="table"><table class="samples" role="table"><thead role="rowgroup"><tr role="row">{head}</tr>'
        f'</thead><tbody role="rowgroup">{body}</tbody></table></div>'
    )
    if len(steps) > 2:
        table += _fold("All readings", f"{len(steps)} steps", "".join(_all_readings(by_query)))
    about = (
        "The embedding of a held-out query, put back into the language model as a soft prompt and continued in words. "
        "It should come to mean what the response means."
    )
    return _section("What the embeddings say", about, table)


def _row(tag: str, text: str | None, label: str) -> str:
    kind = 'role="rowheader" scope="row"' if tag == "th" else f'role="cell" data-label="{label}"'
    return f'<{tag} {kind} dir="auto">{_text(text)}</{tag}>'


def _all_readings(by_query: Mapping[tuple[str, str], Mapping[int, str]]) -> Iterable[str]:
    for (query, response), readings in by_query.items():
        rows = [(f"step {step:,}", text) for step, text in sorted(readings.items())] + [("response", response)]
        cells = "".join(f'<tr><th scope="row">{key}</th><td dir="auto">{_text(text)}</td></tr>' for key, text in rows)
        yield f'<h3 dir="auto">{_text(query)}</h3><table class="numbers">{cells}</table>'


def _text(text: str | None) -> str:
    """A text on one line, cut where it is long."""
    if text is None:
        return '<span class="nothing">not read</span>'
    text = " ".join(text.split())
    text = text if len(text) <= _LETTERS else text[: _LETTERS - 1].rstrip() + "…"
    return escape(text) or '<span class="nothing">nothing</span>'


def _record(history: History, config: Mapping[str, Any], data: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """What one needs to do it again."""
    folds = [
        _fold("Configuration", f"{len(config)} entries", f"<pre>{escape(_yaml(config))}</pre>"),
        _fold("Data", "files, hashes and counts", f"<pre>{escape(_yaml(data))}</pre>"),
        _fold("Versions", f"{len(versions)} packages", f"<pre>{escape(_yaml(versions))}</pre>"),
    ]
    keys = figures.validation_keys(history)
    if keys:
        columns = {
            key: dict(zip(*(part.tolist() for part in figures.series(history, key)), strict=True)) for key in keys
        }
        steps = sorted({step for column in columns.values() for step in column})
        head = "".join(f'<th scope="col">{escape(figures.name(key))}</th>' for key in keys)
        rows = (
            f'<tr><th scope="row">{step:,}</th>'
            + "".join(f"<td>{value(key, column.get(step, math.nan))}</td>" for key, column in columns.items())
            + "</tr>"
            for step in steps
        )
        table = f'<table class="numbers"><thead><tr><th scope="col">Step</th>{head}</tr></thead>{"".join(rows)}</table>'
        folds.append(_fold("Validation in numbers", f"{len(steps)} measurements", f'<div class="scroll">{table}</div>'))
    return _section("For the record", "", "".join(folds))


def _yaml(values: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(dict(values), default=_plain))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10_000).rstrip() if plain else "none"


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.item() if isinstance(value, np.generic) else str(value)


def _first(config: Mapping[str, Any], *keys: str) -> str:
    return next((str(config[key]) for key in keys if config.get(key) is not None), "")


def _section(title: str, about: str, body: str) -> str:
    about = f'<p class="about">{about}</p>' if about else ""
    return f"<section>\n<h2>{title}</h2>\n{about}{body}\n</section>\n"


def _fold(title: str, note: str, body: str) -> str:
    return f"<details><summary>{title} <span>{note}</span></summary><div>{body}</div></details>\n"
