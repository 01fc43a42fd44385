"""One copy of a model serves every framework of a process, and what it embeds with also answers."""

import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
import torch
from langchain_huggingface import ChatHuggingFace
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import TextNode
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from echo_integrations import Encoder, InputError, ModelLoadError, langchain, llama_index
from echo_integrations.chroma import EchoEmbeddingFunction, LLM2VecGenEmbeddingFunction, open_collection
from echo_integrations.registry import registry
from tests import tiny
from tests.conftest import backbone_of

PROMPTS = ["the pump", "water ran out of a pipe while nobody looked at the", "rain"]
NEW_TOKENS = 12


def test_all_frameworks_and_modes_share_one_backbone(nothing_loaded: None, tmp_path: Path, mini_tokens: Path) -> None:
    encoders: list[Encoder] = []
    other_tokens = tiny.token_set("echo-mini", tmp_path / "tokens", thought=0, compression=4, dimension=9, seed=1)
    classes = (langchain.EchoEmbeddings, llama_index.EchoEmbedding, EchoEmbeddingFunction)
    token_classes = (
        langchain.LLM2VecGenEmbeddings,
        llama_index.LLM2VecGenEmbedding,
        LLM2VecGenEmbeddingFunction,
    )
    for number, ((for_langchain, for_llama_index, for_chroma), settings) in enumerate(
        [
            (classes, {"mode": "echo"}),
            (classes, {"mode": "classical"}),
            (token_classes, {"token_set": str(mini_tokens)}),
            (token_classes, {"model": "echo-mini", "token_set": str(other_tokens)}),
        ]
    ):
        embeddings, embedding = for_langchain(**settings), for_llama_index(**settings, truncate_dim=8)
        function = for_chroma(**settings, max_length=64)
        embeddings.embed_query("valve")
        embedding([TextNode(text="valve")])
        collection = open_collection(chromadb.PersistentClient(tmp_path), f"notes-{number}", function)
        collection.add(ids=["1"], documents=["valve"])
        encoders += [embeddings.encoder, embedding.encoder, function.encoder]
    assert len(registry.loaded()) == 1
    assert len({id(backbone_of(encoder).model) for encoder in encoders}) == 1
    for encoder in encoders[:-1]:
        encoder.unload()
    assert len(registry.loaded()) == 1
    encoders[-1].unload()
    assert registry.loaded() == []


# --- one model embeds and answers


def from_langchain(encoder: Encoder) -> tuple[Any, Any, Any]:
    """An LLM for LangChain, the model in it, and its tokenizer."""
    llm = langchain.shared_llm(encoder, do_sample=False, max_new_tokens=NEW_TOKENS)
    return llm, llm.pipeline.model, llm.pipeline.tokenizer


def from_llama_index(encoder: Encoder) -> tuple[Any, Any, Any]:
    """The same for LlamaIndex."""
    llm = llama_index.shared_llm(encoder, max_new_tokens=NEW_TOKENS, generate_kwargs={"do_sample": False})
    return llm, llm._model, llm._tokenizer


def answer(llm: Any, prompt: str) -> str:
    return str(llm.invoke(prompt) if hasattr(llm, "invoke") else llm.complete(prompt).text)


def plain_answers(folder: Path) -> list[str]:
    """What transformers alone says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


share = pytest.mark.parametrize("share", [from_langchain, from_llama_index])


@share
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])  # no pad token and BOS; pad token; eos for everything
@pytest.mark.parametrize("mode", ["echo", "llm2vec-gen"])
def test_the_weights_that_embed_also_answer(
    share: Callable[[Encoder], Any], name: str, mode: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, tokens = tiny_model(name), {}
    if mode == "llm2vec-gen":
        tokens = {"token_set": str(tiny.token_set(folder, tmp_path / "tokens"))}
    encoder = Encoder(model=str(folder), mode=mode, dtype="float32", on_truncate="truncate", **tokens)
    before = encoder.encode(PROMPTS)
    llm, model, tokenizer = share(encoder)
    backbone = backbone_of(encoder)
    own = {key: value.data_ptr() for key, value in backbone.model.named_parameters()}
    assert len(own) > 10
    assert {key: value.data_ptr() for key, value in model.base_model.named_parameters()} == own
    head, embeddings = model.get_output_embeddings().weight, backbone.model.get_input_embeddings().weight
    assert (head.data_ptr() == embeddings.data_ptr()) == model.config.tie_word_embeddings
    assert [answer(llm, prompt) for prompt in PROMPTS] == plain_answers(folder)
    np.testing.assert_array_equal(encoder.encode(PROMPTS), before)
    assert tokenizer.pad_token is not None
    assert tokenizer is not backbone.spec.checkpoint.tokenizer._hf


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_prompts_of_different_lengths_in_one_batch(name: str, tiny_model: Callable[[str], Path]) -> None:
    encoder = Encoder(model=str(tiny_model(name)), dtype="float32")
    llm = langchain.shared_llm(encoder, do_sample=False, max_new_tokens=NEW_TOKENS, batch_size=3)
    assert (llm.batch_size, llm.pipeline._batch_size) == (3, 3)
    assert llm.batch(PROMPTS) == plain_answers(tiny_model(name))


@share
def test_the_weights_stay_while_either_is_in_use(share: Callable[[Encoder], Any], nothing_loaded: None) -> None:
    encoder = Encoder(dtype="float32")
    llm, model, _ = share(encoder)
    encoder.unload()
    again = Encoder(dtype="float32", mode="classical")
    assert backbone_of(again).lm is model
    del llm, model
    gc.collect()  # LlamaIndex's refers to itself
    again.unload()
    assert registry.loaded() == []


def test_answers_come_without_their_prompts_unless_asked_for() -> None:
    encoder = Encoder(dtype="float32")
    settings = {"do_sample": False, "max_new_tokens": 4}
    full = langchain.shared_llm(encoder, return_full_text=True, **settings).invoke(PROMPTS[0])
    assert full == PROMPTS[0] + langchain.shared_llm(encoder, **settings).invoke(PROMPTS[0])


def test_messages(tiny_model: Callable[[str], Path]) -> None:
    """With the model's chat template, where it has one."""
    encoder = Encoder(dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(backbone_of(encoder).spec.checkpoint.folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is rain?"}], tokenize=False, add_generation_prompt=True
    )
    for_langchain, for_llama_index = from_langchain(encoder)[0], from_llama_index(encoder)[0]
    expected = for_langchain.invoke(prompt)
    assert ChatHuggingFace(llm=for_langchain).invoke("What is rain?").content == expected
    message = ChatMessage(role="user", content="What is rain?")
    assert for_llama_index.chat([message]).message.content == expected
    without = from_llama_index(Encoder(model=str(tiny_model("llama")), dtype="float32"))[0]
    assert without.chat([message]).message.content == without.complete("user: What is rain?\nassistant: ").text


def test_the_window_is_the_models(tiny_model: Callable[[str], Path]) -> None:
    encoder = Encoder(model=str(tiny_model("llama")))
    assert llama_index.shared_llm(encoder).metadata.context_window == 512
    assert llama_index.shared_llm(encoder, context_window=100).metadata.context_window == 100


@pytest.mark.parametrize("shared_llm", [langchain.shared_llm, llama_index.shared_llm])
def test_what_cannot_be_shared_is_refused(
    shared_llm: Callable[..., Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="encoder is a EchoEmbeddings, not an Encoder: .*pass its .encoder"):
        shared_llm(langchain.EchoEmbeddings())
    for name in ("model", "tokenizer", "device_map", "model_kwargs"):
        with pytest.raises(InputError, match=f"{name} cannot be chosen here"):
            shared_llm(Encoder(), **{name: None})
    lora = {"lora_config": {"peft_type": "LORA", "r": 1}, "lora": {"a.lora_A.weight": torch.ones(1, 256)}}
    tokens = tiny.token_set("echo-mini", tmp_path / "tokens", **lora)
    with pytest.raises(InputError, match=r"adapts the backbone \(LoRA\).*Encoder\(model='echo-mini'\)"):
        shared_llm(Encoder(mode="llm2vec-gen", token_set=str(tokens)))
    headless = tmp_path / "headless"
    shutil.copytree(tiny_model("llama"), headless)
    (headless / "model.safetensors").unlink()
    AutoModel.from_pretrained(tiny_model("llama")).save_pretrained(headless)
    with pytest.raises(ModelLoadError, match=f"{headless} has no LM head"):
        shared_llm(Encoder(model=str(headless)))


@pytest.mark.parametrize(
    ("shared_llm", "module", "extra"),
    [
        (langchain.shared_llm, "langchain_huggingface", "langchain-llm"),
        (llama_index.shared_llm, "llama_index.llms.huggingface", "llama-index-llm"),
    ],
)
def test_missing_extra(
    shared_llm: Callable[..., Any], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "echo-integrations\[{extra}\]"$'):
        shared_llm(Encoder())
