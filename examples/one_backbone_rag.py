"""RAG with one loaded model: it indexes a handbook in Chroma, finds the passages for a question, and answers from them.

    python examples/one_backbone_rag.py                                                    # offline
    python examples/one_backbone_rag.py --model Qwen/Qwen3-0.6B --token-set ./tokens/mine  # a real model

The weights are in memory once: `shared_llm` generates with those that embed. The built-in demonstration model,
echo-mini, knows little. With it this shows how the parts fit together; do not take its answers for advice.
"""

import argparse
import json
from pathlib import Path

from langchain_chroma import Chroma

from echo_integrations.langchain import LLM2VecGenEmbeddings, shared_llm

HERE = Path(__file__).parent
PROMPT = "Handbook:\n{passages}\n\nQuestion: {question}\nAnswer:"


def open_store(embeddings: LLM2VecGenEmbeddings, folder: Path) -> Chroma:
    """A persistent collection, filled at the first run; its name holds the vector space's fingerprint."""
    store = Chroma(
        f"handbook-{embeddings.mode}-{embeddings.fingerprint[:12]}",
        embeddings,
        persist_directory=str(folder),
        collection_configuration={"hnsw": {"space": "cosine"}},
    )
    if not store.get(limit=1)["ids"]:
        passages = [json.loads(line) for line in (HERE / "data/corpus.jsonl").read_text(encoding="utf-8").splitlines()]
        store.add_texts([f"{p['title']}. {p['text']}" for p in passages], ids=[p["id"] for p in passages])
    return store


def main() -> None:
    """Index, retrieve, answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: the token set's backbone, else echo-mini)")
    parser.add_argument("--token-set", help="folder or Hub id (default: the one that comes with the model)")
    parser.add_argument("--question", default="How do I reset the pump after it has shut itself off?")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=HERE / "chroma", help="where Chroma keeps its files")
    args = parser.parse_args()

    named = {"model": args.model, "token_set": args.token_set}
    embeddings = LLM2VecGenEmbeddings(**{name: value for name, value in named.items() if value})
    store = open_store(embeddings, args.folder)
    llm = shared_llm(embeddings.encoder, do_sample=False, max_new_tokens=args.max_new_tokens)

    found = store.similarity_search_with_score(args.question, k=2)
    passages = "\n\n".join(document.page_content for document, _ in found)
    answer = llm.invoke(PROMPT.format(passages=passages, question=args.question))

    print(f"question  {args.question}")
    for document, distance in found:
        title, text = document.page_content.split(". ", 1)
        print(f"{1 - distance:8.3f}  {title}: {text[:70]}...")
    print(f"answer    {' '.join(answer.split())}")
    print(f"\nOne copy of {llm.pipeline.model.num_parameters() / 1e6:.0f} M parameters did all of this.")
    if embeddings.model_name == "echo-mini":
        print("It is echo-mini, which knows little: name a real model (--model, --token-set) for real answers.")


if __name__ == "__main__":
    main()
