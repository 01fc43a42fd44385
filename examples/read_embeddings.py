"""Embeddings that can be read: the passages nearest to a question, with what each vector says in words beside it.

    python examples/read_embeddings.py                                                    # offline
    python examples/read_embeddings.py --model Qwen/Qwen3-0.6B --token-set ./tokens/mine  # a real model

An LLM2Vec-Gen vector stands for what the model would answer. The same model turns it back into words, so that one can
see why a passage was found. The built-in demonstration model, echo-mini, knows little, and so do its readings.
"""

import argparse
import json
from pathlib import Path

from echo_integrations import Encoder

DATA = Path(__file__).parent / "data"


def main() -> None:
    """Embed passages and keep their soft prompts, find the nearest, and read them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: the token set's backbone, else echo-mini)")
    parser.add_argument("--token-set", help="folder or Hub id (default: the one that comes with the model)")
    parser.add_argument("--question", default="How do I reset the pump after it has shut itself off?")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()

    named = {"model": args.model, "token_set": args.token_set}
    encoder = Encoder(mode="llm2vec-gen", **{name: value for name, value in named.items() if value})
    passages = [json.loads(line) for line in (DATA / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [f"{passage['title']}. {passage['text']}" for passage in passages]

    vectors, soft_prompts = encoder.encode(texts, return_soft_prompts=True)  # (n, D) and (n, N, H)
    query, query_prompt = encoder.encode(args.question, role="query", return_soft_prompts=True)  # (D,) and (N, H)
    scores = vectors @ query
    best = (-scores).argsort()[:3]
    reading = encoder.decode(soft_prompts=query_prompt, max_new_tokens=args.max_new_tokens)[0]
    readings = encoder.decode(soft_prompts=soft_prompts[best], max_new_tokens=args.max_new_tokens)

    print(f"question  {args.question}\n   reads  {' '.join(reading.split())}\n")
    for row, words in zip(best, readings, strict=True):
        print(f"{scores[row]:8.3f}  {passages[row]['title']}: {passages[row]['text'][:70]}...")
        print(f"   reads  {' '.join(words.split())}\n")

    print("the likeliest words at each compression position of the question")
    for position, tokens in enumerate(encoder.explain(args.question, top_k=4, role="query")[0], start=1):
        print(f"{position:>8}  " + "  ".join(f"{token.token!r} {token.probability:.2f}" for token in tokens))


if __name__ == "__main__":
    main()
