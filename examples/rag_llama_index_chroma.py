"""Retrieval for RAG with LlamaIndex and Chroma: index a handbook, ask it, and see what echo embeddings change.

    python examples/rag_llama_index_chroma.py                          # the built-in demonstration model, offline
    python examples/rag_llama_index_chroma.py --model Qwen/Qwen3-0.6B  # any other backbone

Chroma's files stay in examples/chroma (--folder): the second run finds its passages indexed.
"""

import argparse
import json
from pathlib import Path

import chromadb
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.vector_stores.chroma import ChromaVectorStore

from echo_integrations.llama_index import EchoEmbedding

HERE = Path(__file__).parent


def read(name: str) -> list[dict[str, str]]:
    """Rows of a JSONL file beside this script."""
    return [json.loads(line) for line in (HERE / "data" / name).read_text(encoding="utf-8").splitlines()]


def open_index(embedding: EchoEmbedding, folder: Path) -> VectorStoreIndex:
    """An index over a persistent collection, filled at the first run; its name holds the fingerprint."""
    collection = chromadb.PersistentClient(str(folder)).get_or_create_collection(
        f"handbook-{embedding.mode}-{embedding.fingerprint[:12]}-llama", configuration={"hnsw": {"space": "cosine"}}
    )
    store = ChromaVectorStore(chroma_collection=collection)
    if collection.count():
        return VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    nodes = [TextNode(id_=p["id"], text=f"{p['title']}. {p['text']}") for p in read("corpus.jsonl")]
    return VectorStoreIndex(
        nodes, storage_context=StorageContext.from_defaults(vector_store=store), embed_model=embedding
    )


def main() -> None:
    """Ask one question in full, then all of them for the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="echo-mini", help="Hub id or folder of a causal LM (default: %(default)s)")
    parser.add_argument("--question", default="How do I reset the pump after it has shut itself off?")
    parser.add_argument("--folder", type=Path, default=HERE / "chroma", help="where Chroma keeps its files")
    args = parser.parse_args()

    questions = read("questions.jsonl")
    print("recall of the right passage            recall@1  recall@3")
    for mode in ("classical", "echo"):
        retriever = open_index(EchoEmbedding(model=args.model, mode=mode), args.folder).as_retriever(similarity_top_k=3)
        found = [[hit.node.node_id for hit in retriever.retrieve(q["question"])] for q in questions]
        hits = [(q["passage"] == ids[0], q["passage"] in ids) for q, ids in zip(questions, found, strict=True)]
        at_1, at_3 = (sum(column) / len(hits) for column in zip(*hits, strict=True))
        print(f"  {mode:<35}{at_1:>8.1%}{at_3:>10.1%}")
        for hit in retriever.retrieve(args.question):
            title, text = hit.node.get_content().split(". ", 1)
            print(f"    {hit.score:.3f}  {title}: {text[:60]}...")


if __name__ == "__main__":
    main()
