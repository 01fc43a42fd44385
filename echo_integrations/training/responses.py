"""Responses: what an LLM answers to each query, written line by line to a file that can be continued.

Knows nothing of training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm.auto import tqdm

from echo_integrations.batching import windows
from echo_integrations.config import EncodingError, InputError
from echo_integrations.encoder import Encoder
from echo_integrations.files import FileError
from echo_integrations.training.answering import Answerer, LangChainLM, OwnLM, Sampling
from echo_integrations.training.journal import Journal, write_atomically

_FORMAT = "echo-integrations responses 1"
_WINDOW = 16_384  # queries that are sorted by length together


class Responded(NamedTuple):
    """What `respond` has done."""

    written: int
    """Rows written by this call."""
    before: int
    """Rows that the file held already, for these queries or others."""
    without_answer: int
    """Rows of the file that have an error in place of an answer."""


def respond(
    queries: Iterable[str | Mapping[str, Any]],
    out: str | PathLike[str],
    *,
    llm: Encoder | str | Any,
    max_new_tokens: int = 500,
    max_query_length: int = 1024,
    temperature: float = 0.0,
    seed: int = 0,
    num_shards: int = 1,
    shard: int = 0,
    token_budget: int | None = None,
    batch_size: int = 32,
    on_error: Literal["raise", "skip"] = "raise",
    show_progress: bool | None = None,
) -> Responded:
    """Let an LLM answer queries, and write each answer as soon as it is there.

    A query that comes twice is answered once. Called again with the same arguments after whatever ended it, it goes on
    where it was; more queries may have come meanwhile. An empty answer becomes a row with ``"response": ""`` and an
    ``"error"``; `echo_integrations.training.read_examples` leaves such rows out and counts them. Delete them to have
    them asked again. Beside ``out`` lies ``<out>.settings.json``, which says how it was made.

    Args:
        queries: texts, or mappings with a ``"query"``, whose other fields are copied to the result (of a query's first
            mapping; a ``"response"`` or ``"error"`` of theirs is replaced).
        out: JSON lines; made, or continued.
        llm: an `Encoder`, whose backbone answers as a causal LM, with its chat template if it has one and thinking
            switched off where that allows; a model's name or folder in its place; or a LangChain chat model, LLM or
            chain from text to text.
        max_new_tokens: bound on the tokens of an answer.
        max_query_length: tokens of a query that are used, template not counted; fewer where positions end.
        temperature: 0 takes the likeliest token; above it tokens are drawn.
        seed: of drawing; what is drawn for a query does not depend on the others.
        num_shards: parts of the work, each for a process with an ``out`` of its own; joined, the files are the whole.
        shard: which part, from 0. It holds the queries whose hash says so, whatever their order.
        token_budget: prompt and answer tokens in one batch; chosen for the device unless given.
        batch_size: queries that a LangChain model is asked together.
        on_error: what happens when a LangChain model fails at a query: ``"raise"``, after what succeeded is written,
            or ``"skip"``, which writes a row with the ``"error"``.
        show_progress: True: a bar; False: none; None: one on a terminal when it takes over two seconds.

    Returns:
        How many rows were written, were there before, and have no answer.

    Raises:
        InputError: an empty or bad query, or an impossible argument.
        FileError: ``out`` was made with other settings or another model, or cannot be written.
        ModelLoadError: no model, or one without an LM head.
        EncodingError: a LangChain model failed, or one query alone does not fit in memory.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "responses.jsonl"
        >>> respond(["What is a pump?"], out, llm="echo-mini", max_new_tokens=4)
        Responded(written=1, before=0, without_answer=0)
        >>> sorted(json.loads(out.read_text()))
        ['query', 'response']

    Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
    """
    if not 0 <= shard < num_shards:
        raise InputError(f"shard={shard} of num_shards={num_shards}: shards are counted from 0")
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error={on_error!r} is neither 'raise' nor 'skip'")
    rows = _distinct(queries, num_shards, shard)
    sampling = Sampling(max_new_tokens, max_query_length, temperature, seed)
    answerer = _answerer(llm, sampling, token_budget, batch_size)
    settings = {"format": _FORMAT, **answerer.identity(), "num_shards": num_shards, "shard": shard}
    with Journal(Path(out)) as journal:
        done, without_answer = _recover(journal)
        _check_settings(journal.path, settings, empty=not done)
        missing = [query for query in rows if query not in done]
        quiet = {True: False, False: True, None: None}[show_progress]
        delay = 2 if show_progress is None else 0
        with tqdm(
            total=len(rows), initial=len(rows) - len(missing), desc="respond", unit="query", disable=quiet, delay=delay
        ) as bar:
            for window in windows(missing, _WINDOW):
                for answers in answerer.answers(window):
                    failures = [pair for pair in answers if isinstance(pair[1], Exception)]
                    good = answers if on_error == "skip" else [pair for pair in answers if pair not in failures]
                    new = [_row(rows[query], query, answer) for query, answer in good]
                    journal.append(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in new))
                    without_answer += sum("error" in row for row in new)
                    bar.update(len(new))
                    if failures and on_error == "raise":
                        raise _failure(settings["model"], *failures[0], journal.path)
    return Responded(len(missing), len(done), without_answer)


def _answerer(llm: Any, sampling: Sampling, token_budget: int | None, batch_size: int) -> Answerer:
    if isinstance(llm, str):
        llm = Encoder(model=llm)
    if isinstance(llm, Encoder):
        return OwnLM(llm, sampling, token_budget)
    if not callable(getattr(llm, "batch", None)):
        raise InputError(f"llm is a {type(llm).__name__}: give an Encoder, a model's name, or a LangChain chat model")
    if sampling != Sampling() or token_budget is not None:
        raise InputError(
            "max_new_tokens, max_query_length, temperature, seed and token_budget are for this package's own models: "
            "set such things on the LangChain model itself"
        )
    return LangChainLM(llm, batch_size)


def _distinct(queries: Iterable[str | Mapping[str, Any]], num_shards: int, shard: int) -> dict[str, dict[str, Any]]:
    """The queries of a shard, each once, with the fields beside it."""
    if isinstance(queries, str | bytes | Mapping):
        raise InputError(f"queries is one {type(queries).__name__}: pass a list")
    rows: dict[str, dict[str, Any]] = {}
    for index, item in enumerate(queries):
        query = item.get("query") if isinstance(item, Mapping) else item
        if not isinstance(query, str) or not query.strip():
            raise InputError(f"queries[{index}] is {query!r}: give a text that is not empty")
        try:
            digest = hashlib.sha256(query.encode()).digest()
        except UnicodeEncodeError as error:
            raise InputError(f"queries[{index}] is no valid text ({error}): replace its lone surrogates") from error
        if int.from_bytes(digest[:8]) % num_shards == shard:
            rows.setdefault(query, dict(item) if isinstance(item, Mapping) else {})
    return rows


def _failure(model: str, query: str, error: Any, out: Path) -> EncodingError:
    failure = EncodingError(
        f"{model} failed at the query {query[:60]!r} ({type(error).__name__}: {error}); "
        f"what was answered is safe in {out}: run it again, or pass on_error='skip'"
    )
    failure.__cause__ = error
    return failure


def _row(fields: Mapping[str, Any], query: str, answer: str | Exception) -> dict[str, Any]:
    """A line of the result."""
    kept = {name: value for name, value in fields.items() if name not in ("query", "response", "error")}
    if isinstance(answer, Exception):
        return {**kept, "query": query, "response": "", "error": f"{type(answer).__name__}: {answer}"}
    return {**kept, "query": query, "response": answer, **({} if answer else {"error": "the answer is empty"})}


def _recover(journal: Journal) -> tuple[set[str], int]:
    """Queries that have whole rows, and how many of them have no answer; what is not whole at the end is cut off."""
    done: set[str] = set()
    without_answer = size = 0
    with journal.path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                done.add(row["query"])
            except (ValueError, KeyError, TypeError) as error:
                raise FileError(
                    f"{journal.path}, line {number}: not written by respond ({error!r}): correct or delete the line"
                ) from error
            without_answer += "error" in row
            size += len(line)
    journal.truncate(size)
    return done, without_answer


def _check_settings(out: Path, settings: Mapping[str, Any], empty: bool) -> None:
    """Refuse to continue a file that was made otherwise; say beside a new one how it is made."""
    path = out.with_name(f"{out.name}.settings.json")
    if empty:
        write_atomically(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FileError(
            f"{out} holds rows, but {path.name} beside it, which says how they were made, cannot be read ({error}): "
            "choose another file"
        ) from error
    wanted = json.loads(json.dumps(settings))
    different = [name for name in wanted if name != "model" and found.get(name) != wanted[name]]
    if not different:
        return
    known = ("max_new_tokens", "max_query_length", "temperature", "seed", "num_shards", "shard", "format")
    changes = [f"{name} was {found.get(name)!r} and is now {wanted[name]!r}" for name in different if name in known]
    if set(different) - set(known):
        changes.insert(0, f"the model was {found.get('model')!r} and is now {wanted['model']!r}")
    raise FileError(f"{out} cannot be continued: {', '.join(changes)}; choose another file or delete this one")
