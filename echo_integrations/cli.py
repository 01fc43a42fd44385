"""``echo-embed``: embed files of texts, read embeddings, and show what a set of settings amounts to.

Whatever needs torch is imported when it is used.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from echo_integrations import __version__
from echo_integrations.config import EchoIntegrationsError, EncoderSettings, Mode, Role, TruncationWarning
from echo_integrations.files import FileError, PartialStore, Source, write_result, writing
from echo_integrations.flags import TOKEN, add_settings, say, settings_of
from echo_integrations.training.commands import add_commands

if TYPE_CHECKING:
    from echo_integrations.encoder import Encoder

_INPUTS = ("txt", "jsonl", "parquet")
_OUTPUTS = ("npy", "parquet", "jsonl")
_ENCODE = """
Embed every text of a file. INPUT is .txt (one text a line, blank lines are texts too), .jsonl or .parquet; OUT is .npy
(float32, one row a text), .parquet or .jsonl (all fields of the input and "embedding"). Vectors are kept in OUT.partial
as they are done: the same command, run again after whatever ended it, goes on where it was.
"""


_DECODE = """
Embed each TEXT in mode llm2vec-gen and print what the embedding says: the LM continues its soft prompts.
"""
_EXPLAIN = """
Embed each TEXT in mode llm2vec-gen and print, for each compression token, the tokens that the LM head sees in it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``echo-embed``.

    Args:
        argv: the arguments; those of the process unless given.

    Returns:
        The exit code: 0, 1 after a message on stderr, 130 after Ctrl-C. Wrong usage and ``--help`` raise SystemExit.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (KeyboardInterrupt, EchoIntegrationsError, ValidationError, OSError, ModuleNotFoundError) as error:
        say(*_messages(error), *getattr(error, "__notes__", ()))
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _messages(error: BaseException) -> list[str]:
    if isinstance(error, ValidationError):
        return [": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()]
    if isinstance(error, OSError) and error.filename is not None:
        return [f"{error.filename}: {error.strerror}"]
    return [str(error) or "interrupted"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "echo-embed", description="Embeddings of causal LMs: echo, LLM2Vec-Gen, classical.", epilog=TOKEN
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    encode = commands.add_parser(
        "encode", help="embed the texts of a file", description=_ENCODE, epilog=TOKEN, allow_abbrev=False
    )
    encode.add_argument("input", metavar="INPUT", help="a file, or - for standard input")
    encode.add_argument("--out", metavar="OUT", required=True, type=Path, help="a .npy, .parquet or .jsonl file")
    encode.add_argument("--format", choices=_INPUTS, help="of INPUT; its suffix unless given, txt for -")
    encode.add_argument("--field", metavar="NAME", default="text", help="field or column of the texts (default: text)")
    encode.add_argument("--role", choices=list(map(str, Role)), default="document", help="default: document")
    encode.add_argument("--instruction", metavar="TEXT", help="in place of the role's own; '' for none")
    encode.add_argument("--overwrite", action="store_true", help="replace OUT, and an OUT.partial of another run")
    encode.add_argument("--progress", action="store_true", help="show a progress bar even where there is no terminal")
    encode.set_defaults(run=_encode, refuse=encode.error)
    add_settings(encode)

    for name, run, what, how in (
        ("decode", _decode, "say in words what embeddings hold", _DECODE),
        ("explain", _explain, "show the logit lens of embeddings", _EXPLAIN),
    ):
        read = commands.add_parser(name, help=what, description=how, epilog=TOKEN, allow_abbrev=False)
        read.add_argument("texts", metavar="TEXT", nargs="+", help="what to embed; - for the lines of standard input")
        read.add_argument("--role", choices=list(map(str, Role)), default="query", help="default: query")
        read.add_argument("--instruction", metavar="TEXT", help="in place of the role's own; '' for none")
        if name == "decode":
            read.add_argument("--max-new-tokens", metavar="N", type=int, default=32, help="default: 32")
        else:
            read.add_argument("--top-k", metavar="N", type=int, default=5, help="tokens a position (default: 5)")
        read.add_argument("--json", action="store_true", help="print a JSON array")
        read.set_defaults(run=run)
        add_settings(read)

    add_commands(commands)

    info = commands.add_parser(
        "info",
        help="show vector space, device and templates",
        description="Show what the settings amount to; loads no weights.",
        epilog=TOKEN,
        allow_abbrev=False,
    )
    info.add_argument("--json", action="store_true", help="print a JSON object")
    info.set_defaults(run=_info)
    add_settings(info)
    return parser


def _encoder(args: argparse.Namespace) -> Encoder:
    from echo_integrations.encoder import Encoder

    return Encoder(**settings_of(args))


def _reader(args: argparse.Namespace) -> tuple[Encoder, list[str]]:
    """An encoder of the mode whose embeddings can be read, and the texts."""
    from echo_integrations.encoder import Encoder

    encoder = Encoder(**{"mode": Mode.LLM2VEC_GEN, **settings_of(args)})
    return encoder, sys.stdin.read().splitlines() if args.texts == ["-"] else args.texts


def _decode(args: argparse.Namespace) -> None:
    encoder, texts = _reader(args)
    answers = encoder.decode(texts, role=args.role, instruction=args.instruction, max_new_tokens=args.max_new_tokens)
    if args.json:
        rows = [{"text": text, "decoded": answer} for text, answer in zip(texts, answers, strict=True)]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    _print_table(["text", "decoded"], [list(row) for row in zip(texts, answers, strict=True)])


def _explain(args: argparse.Namespace) -> None:
    encoder, texts = _reader(args)
    lens = encoder.explain(texts, top_k=args.top_k, role=args.role, instruction=args.instruction)
    if args.json:
        rows = [
            {"text": text, "tokens": [[t._asdict() for t in at] for at in row]}
            for text, row in zip(texts, lens, strict=True)
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for text, row in zip(texts, lens, strict=True):
        print(_line(text))
        cells = [[f"{token!r} {probability:.0%}" for token, probability in at] for at in row]
        _print_table(["token", *map(str, range(1, args.top_k + 1))], [[str(i), *at] for i, at in enumerate(cells, 1)])


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they need to be, the last one as wide as the terminal has room for."""
    rows = [[_line(cell) for cell in row] for row in rows]
    widths = [min(48, max(len(row[i]) for row in [head, *rows])) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        *cells, last = row
        start = "  ".join(
            textwrap.shorten(cell, width, placeholder="...").ljust(width)
            for cell, width in zip(cells, widths, strict=False)
        )
        print(f"{start}  {last}")


def _line(text: str) -> str:
    return " ".join(text.split())


def _info(args: argparse.Namespace) -> None:
    encoder = _encoder(args)
    from echo_integrations.device import choose_device, choose_dtype
    from echo_integrations.resolve import resolve

    space = encoder.vector_space()
    device = choose_device(encoder.device)
    facts: dict[str, Any] = {
        "model": resolve(encoder)[0].name,
        "mode": str(encoder.mode),
        "dimension": encoder.dimension,
        "fingerprint": encoder.fingerprint,
        "device": str(device),
        "dtype": str(choose_dtype(encoder.dtype, device)).removeprefix("torch."),
        **{name: space[name] for role in Role for name in (f"{role}_template", f"{role}_max_length") if name in space},
        **{f"{role}_instruction": text for role in Role if (text := encoder.instruction(role))},
        **{name: space[name] for name in ("token_set", "pooling") if name in space},
        "normalize_embeddings": encoder.normalize_embeddings,
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        text = str(value)
        print(f"{key:<20}  {text if text.isprintable() else json.dumps(text, ensure_ascii=False)}")


def _encode(args: argparse.Namespace) -> None:
    out: Path = args.out
    output = out.suffix.lower().removeprefix(".")
    kind = args.format or ("txt" if args.input == "-" else Path(args.input).suffix.lower().removeprefix("."))
    if output not in _OUTPUTS:
        args.refuse(f"--out {out} must end in {', '.join('.' + o for o in _OUTPUTS)}")
    if kind not in _INPUTS:
        args.refuse(f"{args.input} does not end in {', '.join('.' + i for i in _INPUTS)}: say what it is with --format")
    EncoderSettings(**settings_of(args))
    if out.is_dir():
        raise FileError(f"{out} is a folder: choose another name")
    if out.exists() and not args.overwrite:
        raise FileError(f"{out} exists already: choose another name or pass --overwrite")
    if out.exists() and args.input != "-" and Path(args.input).exists() and out.samefile(args.input):
        raise FileError(f"{out} is the input: choose another name")
    if not out.parent.is_dir():
        raise FileError(f"there is no folder {out.parent}: make it, or choose another place for --out")
    with _opened(args.input) as file:
        source = Source("standard input" if args.input == "-" else args.input, file, kind, args.field, output)
        encoder = _encoder(args)
        header = {
            "format": "echo-embed partial 1",
            "input": source.sha256,
            "texts": f"{kind} {args.field}",
            "role": args.role,
            "instruction": encoder.instruction(args.role) if args.instruction is None else args.instruction,
            "fingerprint": encoder.fingerprint,
            "dimension": encoder.dimension,
        }
        partial = out.with_name(out.name + ".partial")
        with PartialStore(partial, header, source.count, overwrite=args.overwrite) as store:
            there, start = store.done, time.monotonic()
            _fill(store, source, encoder, args, header["instruction"])
            seconds = time.monotonic() - start
            write_result(out, source, store)
    done = source.count - there
    say(
        f"{out}: {source.count} rows of {encoder.dimension} components; {done} encoded in {seconds:.1f} s "
        f"({done / max(seconds, 1e-9):.1f} texts/s)"
    )


def _fill(store: PartialStore, source: Source, encoder: Encoder, args: argparse.Namespace, instruction: str) -> None:
    """Encode what the store lacks."""
    from tqdm import tqdm

    rows = np.flatnonzero(store.missing)
    texts = compress(source.texts(), store.missing)

    def in_rows(message: object) -> str:
        """A message of the encoder, with rows of the file, from 1, in place of positions among ``texts``."""
        return re.sub(r"(^|for )texts\[(\d+)\]", lambda found: f"{found[1]}row {rows[int(found[2])] + 1}", str(message))

    shown = args.progress or sys.stderr.isatty()
    with (
        tqdm(total=source.count, initial=store.done, desc="encode", unit="text", disable=not shown) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always", TruncationWarning)
        warnings.showwarning = lambda message, *_: bar.write(f"echo-embed: {in_rows(message)}", file=sys.stderr)
        try:
            for positions, vectors in encoder.encode_batches(texts, role=args.role, instruction=instruction):
                store.append(rows[positions], vectors)
                bar.update(len(positions))
        except EchoIntegrationsError as error:
            error.args = (in_rows(error),)
            raise
    if store.missing.any():
        raise FileError(f"{args.input} was changed while it was being read: run the command again")


@contextmanager
def _opened(name: str) -> Iterator[io.BufferedIOBase]:
    """The input; what can be read only once is copied to a temporary file."""
    file: Any
    with nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as file:
        if name != "-" and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            yield file
            return
        with writing(f"a copy of the input in {tempfile.gettempdir()}"):
            copy: Any = tempfile.TemporaryFile()  # noqa: SIM115
            shutil.copyfileobj(file, copy)
            copy.flush()
        with copy:
            yield copy
