"""What the commands of ``echo-embed`` share: flags, made from `EncoderSettings`, and messages. Loads no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Set
from enum import StrEnum
from types import NoneType
from typing import Any, get_args

from echo_integrations.config import EncoderSettings

TOKEN = "For a private or gated model set HF_TOKEN or log in with `hf auth login`; tokens are no arguments here."
_NO_FLAGS = ("token", "show_progress")


def add_settings(parser: argparse.ArgumentParser, names: Set[str] = frozenset(EncoderSettings.model_fields)) -> None:
    """A flag for every setting of ``names``; what is not given keeps its default."""
    group = parser.add_argument_group("settings")
    how: dict[str, Any]
    for name, field in EncoderSettings.model_fields.items():
        if name in _NO_FLAGS or name not in names:
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


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags."""
    return {name: value for name, value in vars(args).items() if name in EncoderSettings.model_fields}


def say(*lines: str) -> None:
    """Write a message to stderr."""
    print("echo-embed:", "\n".join(lines), file=sys.stderr)
