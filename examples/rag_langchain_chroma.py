"""Retrieval for RAG with LangChain and Chroma: index a handbook, ask it, and compare three kinds of embeddings.

    python examples/rag_langchain_chroma.py                          # the built-in demonstration model, offline
    python examples/rag_langchain_chroma.py --model Qwen/Qwen3-0.6B  # any other backbone, --token-set for its tokens

Chroma's files stay in examples/chroma (--folder): the second run finds its passages indexed.
"""

import argparse
import json
from pathlib import Path

from langchain_chroma import Chroma

from echo_integrations.langchain import EchoEmbeddings, LLM2VecGenEmbeddings

HERE = Path(__file__).parent


def read(name: str) -> list[dict[str, str]]:
    """Rows of a JSONL file beside this script."""
    return [json.loads(line) for line in (HERE / "data" / name).read_text(encoding="utf-8").splitlines()]


def open_store(embeddings: EchoEmbeddings | LLM2VecGenEmbeddings, folder: Path) -> Chroma:
    """A persistent collection, filled at the first run; its name holds the vector space's fingerprint."""
    store = Chroma(
        f"handbook-{embeddings.mode}-{embeddings.fingerprint[:12]}",
        embeddings,
        persist_directory=str(folder),
        collection_configuration={"hnsw": {"space": "cosine"}},
    )
    if not store.get(limit=1)["ids"]:
        passages = read("corpus.jsonl")
        store.add_texts([f"{p['title']}. {p['text']}" for p in passages], ids=[p["id"] for p in passages])
    return store


def main() -> None:
    """Ask one question in full, then all of them for the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="echo-mini", help="Hub id or folder of a causal LM (default: %(default)s)")
    parser.add_argument("--token-set", help="trained tokens of that LM (default: those of echo-mini, for echo-mini)")
    parser.add_argument("--question", default="How do I reset the pump after it has shut itself off?")
    parser.add_argument("--folder", type=Path, default=HERE / "chroma", help="where Chroma keeps its files")
    args = parser.parse_args()

    questions = read("questions.jsonl")
    table: list[str] = []
    kinds: list[EchoEmbeddings | LLM2VecGenEmbeddings]
    kinds = [EchoEmbeddings(model=args.model, mode="classical"), EchoEmbeddings(model=args.model)]
    if args.token_set or args.model == "echo-mini":
        kinds += [LLM2VecGenEmbeddings(model=args.model, token_set=args.token_set)]
    for embeddings in kinds:
        store = open_store(embeddings, args.folder)
        print(f"\n{embeddings.mode}: {args.question}")
        for document, distance in store.similarity_search_with_score(args.question, k=3):
            print(f"  {1 - distance:.3f}  {document.page_content[:90]}...")
        found = [[d.id for d in store.similarity_search(q["question"], k=3)] for q in questions]
        at_1, at_3 = (
            sum(q["passage"] in ids[:k] for q, ids in zip(questions, found, strict=True)) / len(questions)
            for k in (1, 3)
        )
        table.append(f"  {embeddings.mode:<13}{at_1:>8.1%}{at_3:>10.1%}")
    print(f"\nrecall of the right passage, {len(questions)} questions over {len(read('corpus.jsonl'))} passages")
    print("               recall@1  recall@3", *table, sep="\n")


if __name__ == "__main__":
    main()
