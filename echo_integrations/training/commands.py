"""The commands of ``echo-embed`` around training: respond, train, evaluate.

They belong to the command line, whose helpers they use. Whatever needs torch is imported when a command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echo_integrations.config import InputError, Mode, TruncationWarning
from echo_integrations.flags import TOKEN, add_settings, say, settings_of

_RESPOND = """
Let an LLM answer every query of INPUT: .jsonl with a field "query", whose other fields are kept, or .txt with one query
a line; either may be packed (.xz, .gz). Each answer is written to OUT as soon as it is there, so the same command, run
again after whatever ended it, goes on where it was. The model answers in its chat template, thinking switched off.
"""
_TRAIN = """
Train a token set as RECIPE, a YAML file of settings, says; the same command, run again, goes on from the last
checkpoint. OUT becomes a folder that --token-set takes, with report/index.html in it. On several GPUs: accelerate
launch -m echo_integrations train ...
"""
_EVALUATE = """
Measure retrieval: recall, hits, nDCG and MRR of MODEL, a token set or a model. Without MODEL the settings say what is
measured.
"""
_OF_A_MODEL = {  # settings that matter for answering
    *("model_name", "revision", "cache_folder", "trust_remote_code", "device", "dtype", "attn_implementation"),
    *("adapter", "token_budget", "model_kwargs"),
}


def add_commands(subparsers: Any) -> None:
    """Add the commands to those of ``echo-embed``.

    Args:
        subparsers: what ``ArgumentParser.add_subparsers`` returned.
    """

    def command(name: str, what: str, how: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = subparsers.add_parser(
            name, help=what, description=how, epilog=TOKEN, allow_abbrev=False
        )
        parser.set_defaults(refuse=parser.error)
        return parser

    respond = command("respond", "let an LLM answer queries", _RESPOND)
    respond.add_argument("input", metavar="INPUT", type=Path, help="a .jsonl or .txt file")
    respond.add_argument("--out", metavar="OUT", required=True, type=Path, help="a .jsonl file; made, or continued")
    respond.add_argument("--max-new-tokens", metavar="N", type=int, default=500, help="of an answer (default: 500)")
    respond.add_argument("--max-query-length", metavar="N", type=int, default=1024, help="in tokens (default: 1024)")
    respond.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0, the default, is greedy")
    respond.add_argument("--seed", metavar="N", type=int, default=0, help="of drawing, with --temperature (default: 0)")
    respond.add_argument("--num-shards", metavar="N", type=int, default=1, help="parts of the work (default: 1)")
    respond.add_argument("--shard", metavar="N", type=int, default=0, help="which part, from 0 (default: 0)")
    _add_on_error(respond)
    add_settings(respond, _OF_A_MODEL)
    respond.set_defaults(run=_respond)

    train = command("train", "train a token set", _TRAIN)
    train.add_argument("recipe", metavar="RECIPE", type=Path, help="a .yaml file")
    train.add_argument("--data", metavar="FILE", required=True, type=Path, help=".jsonl of query and response")
    train.add_argument("--out", metavar="OUT", required=True, type=Path, help="the folder of the token set")
    train.add_argument(
        "--teacher",
        metavar="NAME",
        default="echo",
        help="a sentence-transformers model (folder or Hub id), echo:MODEL, classical:MODEL, or echo, the default: "
        "echo embeddings of the backbone itself",
    )
    train.add_argument("--teacher-name", metavar="NAME", help="what the token set calls the teacher")
    train.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting in place of the recipe's; repeatable",
    )
    train.add_argument("--no-resume", action="store_true", help="start anew rather than from the last checkpoint")
    _add_on_error(train)
    train.set_defaults(run=_train)

    evaluate = command("evaluate", "measure retrieval", _EVALUATE)
    evaluate.add_argument("measured", metavar="MODEL", nargs="?", help="a token set's or a model's folder or Hub id")
    evaluate.add_argument("--queries", metavar="FILE", required=True, type=Path, help=".jsonl of _id and text")
    evaluate.add_argument("--corpus", metavar="FILE", required=True, type=Path, help=".jsonl of _id, text, maybe title")
    evaluate.add_argument(
        "--qrels", metavar="FILE", required=True, type=Path, help=".tsv of query, document, relevance"
    )
    evaluate.add_argument("--ks", metavar="K", type=int, nargs="+", default=[1, 10], help="depths (default: 1 10)")
    evaluate.add_argument("--json", action="store_true", help="print a JSON object")
    add_settings(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _add_on_error(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="stop at the first bad line (raise, the default), or leave bad lines out and count them (skip)",
    )


def _respond(args: argparse.Namespace) -> None:
    from echo_integrations.encoder import Encoder
    from echo_integrations.training.data import read_rows
    from echo_integrations.training.responses import respond

    if args.out.suffix.lower() != ".jsonl":
        args.refuse(f"--out {args.out} must end in .jsonl")
    names = ("max_new_tokens", "max_query_length", "temperature", "seed", "num_shards", "shard")
    with _said_warnings():
        rows = list(read_rows(args.input, on_error=args.on_error))
        done = respond(
            rows, args.out, llm=Encoder(**settings_of(args)), **{name: getattr(args, name) for name in names}
        )
    say(f"{args.out}: {done.before + done.written} rows, {done.written} of them new, {done.without_answer} unanswered")


def _train(args: argparse.Namespace) -> None:
    from echo_integrations.training import TrainingConfig, as_teacher, train
    from echo_integrations.training.data import read_examples

    config = TrainingConfig.from_yaml(args.recipe)
    if args.set:
        config = TrainingConfig(**_changed(config.model_dump(exclude_unset=True), args.set))
    main = os.environ.get("RANK", "0") == "0"  # with accelerate every process runs this, and one of them speaks
    with _said_warnings(main):
        examples = read_examples(args.data, on_error=args.on_error)
        teacher = as_teacher(args.teacher, name=args.teacher_name) if args.teacher_name else args.teacher
        token_set = train(config, examples, teacher=teacher, out=args.out, resume=not args.no_resume)
    if main:
        say(f"{args.out}: a token set of {len(token_set.rows)} tokens and {token_set.dimension} components")


def _changed(settings: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """Settings with changes such as ``lora.r=16``, whose values are YAML."""
    import yaml

    for change in changes:
        path, equals, text = change.partition("=")
        *parents, name = path.split(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {change}: the value is no YAML ({error})") from error
        if not equals or not name:
            raise InputError(f"--set {change}: write NAME=VALUE")
        inner = settings
        for parent in parents:
            if not isinstance(inner.get(parent), dict):
                inner[parent] = {}
            inner = inner[parent]
        inner[name] = value
    return settings


def _evaluate(args: argparse.Namespace) -> None:
    from echo_integrations.encoder import Encoder
    from echo_integrations.token_set import is_token_set
    from echo_integrations.training.evaluation import evaluate, read_qrels, read_texts

    settings = settings_of(args)
    if args.measured is not None and is_token_set(Path(args.measured)):
        if "token_set" in settings:
            args.refuse(f"{args.measured} is a token set, and --token-set names another: give one of them")
        settings = {"mode": Mode.LLM2VEC_GEN, **settings, "token_set": args.measured}
    elif args.measured is not None:
        if "model_name" in settings:
            args.refuse(f"{args.measured} and --model name two models: give one of them")
        settings["model_name"] = args.measured
    with _said_warnings():
        encoder = Encoder(**settings)
        queries, corpus, qrels = read_texts(args.queries), read_texts(args.corpus), read_qrels(args.qrels)
        results = evaluate(encoder, queries, corpus, qrels, ks=args.ks)
    if args.json:
        sys.stdout.write(json.dumps(results, indent=2) + "\n")
        return
    for name, value in results.items():
        sys.stdout.write(f"{name:<12}{value:>8}\n" if name == "queries" else f"{name:<12}{value:>8.4f}\n")


@contextmanager
def _said_warnings(aloud: bool = True) -> Iterator[None]:
    """Warnings about data and cut texts in the command line's own voice."""
    from echo_integrations.training.data import DataWarning

    with warnings.catch_warnings():
        show = warnings.showwarning

        def speak(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, DataWarning | TruncationWarning):
                show(message, category, *where, **more)
            elif aloud:
                say(str(message))

        for category in (DataWarning, TruncationWarning):
            warnings.simplefilter("always", category)
        warnings.showwarning = speak
        yield
