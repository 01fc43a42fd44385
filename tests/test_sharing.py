"""One copy of a model serves every framework of a process."""

from pathlib import Path

import chromadb
from llama_index.core.schema import TextNode

from echo_integrations.backbone import registry
from echo_integrations.chroma import EchoEmbeddingFunction, open_collection
from echo_integrations.encoder import Encoder
from echo_integrations.langchain import EchoEmbeddings
from echo_integrations.llama_index import EchoEmbedding
from tests.conftest import backbone_of


def test_all_frameworks_and_modes_share_one_backbone(nothing_loaded: None, tmp_path: Path) -> None:
    encoders = []
    for mode in ("echo", "classical"):
        langchain = EchoEmbeddings(mode=mode)
        llama_index = EchoEmbedding(mode=mode, pooling="last")
        function = EchoEmbeddingFunction(mode=mode, max_length=64)
        langchain.embed_query("valve")
        llama_index([TextNode(text="valve")])
        collection = open_collection(chromadb.PersistentClient(tmp_path), f"notes-{mode}", function)
        collection.add(ids=["1"], documents=["valve"])
        encoders += [langchain.encoder, llama_index.encoder, function.encoder, Encoder(mode=mode)]
    assert len(registry.loaded()) == 1
    assert len({id(backbone_of(encoder).model) for encoder in encoders}) == 1
    for encoder in encoders[:-1]:
        encoder.unload()
    assert len(registry.loaded()) == 1
    encoders[-1].unload()
    assert registry.loaded() == []
