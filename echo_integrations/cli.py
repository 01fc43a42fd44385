"""``echo-embed``: embed files of texts, and show what a set of settings amounts to.

The flags for settings are made from `EncoderSettings`. Whatever needs torch is imported when it is used.
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
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from itertools import compress
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from pydantic import ValidationError

from echo_integrations import __version__
from echo_integrations.config import EchoIntegrationsError, EncoderSettings, Role, TruncationWarning
from echo_integrations.files import FileError, PartialStore, Source, write_result, writing

if TYPE_CHECKING:
    from echo_integrations.encoder import Encoder

_INPUTS = ("txt", "jsonl", "parquet")
_OUTPUTS = ("npy", "parquet", "jsonl")
_NO_FLAGS = ("token", "show_progress")
_TOKEN = "For a private or gated model set HF_TOKEN or log in with `hf auth login`; tokens are no arguments here."
_ENCODE = """
Embed every text of a file. INPUT is .txt (one text a line, blank lines are texts too), .jsonl or .parquet; OUT is .npy
(float32, one row a text), .parquet or .jsonl (all fields of the input and "embedding"). Vectors are kept in OUT.partial
as they are done: the same command, run again after whatever ended it, goes on where it was.
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
    except (KeyboardInterrupt, EchoIntegrationsError, ValidationError, OSError) as error:
        _say(*_messages(error), *getattr(error, "__notes__", ()))
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _say(*lines: str) -> None:
    print("echo-embed:", "\n".join(lines), file=sys.stderr)


def _messages(error: BaseException) -> list[str]:
    if isinstance(error, ValidationError):
        return [": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()]
    if isinstance(error, OSError) and error.filename is not None:
        return [f"{error.filename}: {error.strerror}"]
    return [str(error) or "interrupted"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("echo-embed", description="Echo embeddings of causal LMs.", epilog=_TOKEN)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    encode = commands.add_parser(
        "encode", help="embed the texts of a file", description=_ENCODE, epilog=_TOKEN, allow_abbrev=False
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
    _add_settings(encode)

    info = commands.add_parser(
        "info",
        help="show vector space, device and templates",
        description="Show what the settings amount to; loads no weights.",
        epilog=_TOKEN,
        allow_abbrev=False,
    )
    info.add_argument("--json", action="store_true", help="print a JSON object")
    info.set_defaults(run=_info)
    _add_settings(info)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting; what is not given keeps its default."""
    group = parser.add_argument_group("settings")
    how: dict[str, Any]
    for name, field in EncoderSettings.model_fields.items():
        if name in _NO_FLAGS:
            continue
        flags = [f"--{word.replace('_', '-')}" for word in (field.alias, name) if word]
        types = (dict,) if name == "model_kwargs" else get_args(field.annotation) or (field.annotation,)
        kind = next(t for t in types if t is not NoneType)
        how = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": " ".join((field.description or "").replace("`", "").replace("%", "%%").split()),
        }
        if kind is bool and field.default:
            flags = [f"--no-{name.removesuffix('_embeddings')}"]
            how |= {"action": "store_false", "help": f"Turn off: {how['help']}"}
        elif kind is bool:
            how |= {"action": "store_true"}
        elif issubclass(kind, StrEnum):
            how |= {"choices": list(map(str, kind))}
        elif kind is dict:
            how |= {"type": json.loads, "metavar": "JSON"}
        else:
            how |= {"type": kind, "metavar": "N" if kind is int else "TEXT"}
        if kind is not bool and field.default is not None:
            how["help"] += f" (default: {field.default})"
        group.add_argument(*flags, **how)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name in EncoderSettings.model_fields}


def _encoder(args: argparse.Namespace) -> Encoder:
    from echo_integrations.encoder import Encoder

    return Encoder(**_settings(args))


def _info(args: argparse.Namespace) -> None:
    encoder = _encoder(args)
    from echo_integrations.backbone import choose_device, choose_dtype

    space = encoder.vector_space()
    device = choose_device(encoder.device)
    facts = {
        "model": encoder.model_name,
        "mode": str(encoder.mode),
        "dimension": encoder.dimension,
        "fingerprint": encoder.fingerprint,
        "device": str(device),
        "dtype": str(choose_dtype(encoder.dtype, device)).removeprefix("torch."),
        **{f"{role}_{what}": space[f"{role}_{what}"] for role in Role for what in ("template", "max_length")},
        **{f"{role}_instruction": text for role in Role if (text := getattr(encoder, f"{role}_instruction"))},
        "pooling": str(encoder.pooling),
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
    settings = EncoderSettings(**_settings(args))
    if out.is_dir():
        raise FileError(f"{out} is a folder: choose another name")
    if out.exists() and not args.overwrite:
        raise FileError(f"{out} exists already: choose another name or pass --overwrite")
    if out.exists() and args.input != "-" and Path(args.input).exists() and out.samefile(args.input):
        raise FileError(f"{out} is the input: choose another name")
    instruction = args.instruction
    if instruction is None:
        instruction = settings.query_instruction if args.role == "query" else settings.document_instruction
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
            "instruction": instruction or "",
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
    _say(
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
