"""What embeddings say: soft prompts, greedy answers, the logit lens."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from echo_integrations.config import EncodingError, InputError, ModelLoadError
from echo_integrations.encoder import Encoder
from echo_integrations.resolve import resolve
from tests import reference, tiny
from tests.conftest import backbone_of

Tiny = Callable[[str], Path]

TEXTS = ["The pump was closed.", "hi", "water ran out of a pipe", "rain", "the valve " * 30]


@pytest.fixture
def gen(tiny_model: Tiny, tmp_path: Path) -> Callable[..., Encoder]:
    """An encoder of a tiny model and a random token set of it."""

    def make(name: str = "qwen3", folder: Path | None = None, **settings: Any) -> Encoder:
        model = folder or tiny_model(name)
        path = tmp_path / f"set-{name}"
        if not path.exists():
            tiny.token_set(model, path, thought=2, compression=3)
        plain = {"dtype": "float32", "on_truncate": "truncate", "max_length": 48, "mode": "llm2vec-gen"}
        return Encoder(**{**plain, "model": str(model), "token_set": str(path), **settings})

    return make


@pytest.mark.parametrize("backbone", ["qwen3", "llama"])
def test_the_released_codes_answers(backbone: str, data: Path) -> None:
    settings = {"model": str(data / backbone / "base"), "token_set": str(data / backbone / "llm2vec_gen")}
    encoder = Encoder(**settings, mode="llm2vec-gen", dtype="float32")
    soft_prompts = torch.from_numpy(np.load(data / backbone / "gen.npz")["recon|512"][:4])
    with torch.inference_mode():
        ids = backbone_of(encoder).generate(soft_prompts, max_new_tokens=12)
    assert ids == json.loads((data / backbone / "greedy.json").read_text())
    texts = json.loads((data / "texts.json").read_text())["texts"][:4]
    tokenizer = resolve(encoder)[0].tokenizer
    assert encoder.decode(texts, instruction="", max_new_tokens=12) == [tokenizer.decode(row) for row in ids]


@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("budget", [None, 40])
def test_answers_are_those_of_a_plain_loop(name: str, budget: int | None, gen: Any, tiny_model: Tiny) -> None:
    """Batched and cached, on models without a pad token, too; a budget of 40 positions is one or two at a time."""
    encoder = gen(name, token_budget=budget)
    soft_prompts = encoder.encode(TEXTS, return_soft_prompts=True)[1]
    tokenizer = resolve(encoder)[0].tokenizer
    end = {0, tokenizer.eos_id}  # the configurations say 0, whatever the tokenizer has
    plain = [reference.answer(tiny_model(name), row, 20, end) for row in soft_prompts]
    expected = [tokenizer.decode(ids) for ids in plain]
    assert encoder.decode(soft_prompts=soft_prompts, max_new_tokens=20) == expected
    assert encoder.decode(TEXTS, max_new_tokens=20) == expected
    assert len(set(expected)) > 1 or name.startswith("gpt")  # random GPTs say one thing only


def test_an_answer_stops_at_the_end_of_sequence(tiny_model: Tiny, tmp_path: Path) -> None:
    """Each row by itself; the model's generation settings may name several tokens that end it."""
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    tokens = tiny.token_set(folder, tmp_path / "set")
    settings = {"model": str(folder), "token_set": str(tokens), "mode": "llm2vec-gen", "dtype": "float32"}
    encoder = Encoder(**settings)
    soft = encoder.encode(TEXTS, return_soft_prompts=True)[1]
    long = [reference.answer(folder, row, 12, end=set()) for row in soft]
    ends = [0, resolve(encoder)[0].tokenizer.eos_id, long[0][3], long[1][6]]
    GenerationConfig(eos_token_id=ends, do_sample=True, temperature=9.0, repetition_penalty=5.0).save_pretrained(folder)
    encoder.unload()
    expected = [reference.answer(folder, row, 12, end=set(ends)) for row in soft]
    assert min(map(len, expected)) < max(map(len, expected))
    with torch.inference_mode():
        assert backbone_of(Encoder(**settings)).generate(torch.from_numpy(soft), 12) == expected


def test_one_string_and_one_soft_prompt(gen: Any) -> None:
    encoder = gen()
    vector, soft_prompt = encoder.encode("rain", return_soft_prompts=True)
    assert vector.shape == (24,) and soft_prompt.shape == (3, 32) and soft_prompt.dtype == np.float32
    answer = encoder.decode("rain", max_new_tokens=9)
    assert answer == encoder.decode(soft_prompts=soft_prompt, max_new_tokens=9) and len(answer) == 1
    assert encoder.decode([]) == [] and encoder.explain([]) == []


def test_soft_prompts_are_in_the_texts_order_and_repeat(gen: Any) -> None:
    encoder = gen()
    vectors, soft = encoder.encode(["rain", TEXTS[4], "rain"], return_soft_prompts=True)
    assert np.array_equal(soft[0], soft[2]) and not np.array_equal(soft[0], soft[1])
    np.testing.assert_allclose(soft[1], encoder.encode(TEXTS[4], return_soft_prompts=True)[1], atol=2e-6)
    np.testing.assert_allclose(vectors, encoder.encode(["rain", TEXTS[4], "rain"]), atol=2e-6)


def test_roles_and_instructions_are_read_too(gen: Any) -> None:
    encoder = gen(query_instruction="Ask:")
    as_query = encoder.encode("rain", role="query", return_soft_prompts=True)[1]
    np.testing.assert_allclose(as_query, encoder.encode("Ask: rain", instruction="", return_soft_prompts=True)[1])
    assert encoder.decode("rain", role="query") == encoder.decode("Ask: rain", instruction="")
    assert encoder.explain("rain", role="query") == encoder.explain("Ask: rain", instruction="")


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_the_lens_is_the_lm_head_on_the_compression_tokens(name: str, gen: Any, tiny_model: Tiny) -> None:
    """Gemma 2 also caps its logits."""
    encoder = gen(name)
    lens = encoder.explain(TEXTS, top_k=4)
    assert (len(lens), {len(row) for row in lens}, {len(at) for row in lens for at in row}) == (5, {3}, {4})
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=torch.float32)
    checkpoint, token_set = resolve(encoder)
    assert token_set is not None
    text = encoder.instruction("document") + " hi"
    ids = torch.tensor([[*checkpoint.tokenizer.prefix, *checkpoint.tokenizer.plain([text])[0]]])[:, : 48 - 5]
    with torch.inference_mode():
        rows = torch.cat([model.get_input_embeddings()(ids)[0], backbone_of(encoder).head(token_set).rows])
        probabilities, tokens = model(inputs_embeds=rows[None]).logits[0, -3:].softmax(-1).topk(4)
    for position in range(3):
        assert [t.token for t in lens[1][position]] == [
            checkpoint.tokenizer.decode([i], skip_special_tokens=False) for i in tokens[position].tolist()
        ]
        np.testing.assert_allclose([t.probability for t in lens[1][position]], probabilities[position], rtol=1e-3)


def test_more_texts_than_the_head_takes_at_once(gen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = gen()
    expected = encoder.explain(TEXTS, top_k=2)
    monkeypatch.setattr("echo_integrations.reading._LENS_POSITIONS", 4)
    assert [[[t.token for t in at] for at in row] for row in encoder.explain(TEXTS, top_k=2)] == [
        [[t.token for t in at] for at in row] for row in expected
    ]


def test_a_checkpoint_without_a_head_embeds_and_does_not_answer(tiny_model: Tiny, tmp_path: Path, gen: Any) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "headless"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = gen("llama", folder)
    expected = gen("llama").encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-6)
    for read in (encoder.decode, encoder.explain):
        with pytest.raises(ModelLoadError, match="headless has no LM head, so it embeds but cannot answer"):
            read(TEXTS)


def test_other_modes_have_nothing_to_read(tiny_model: Tiny) -> None:
    encoder = Encoder(model=str(tiny_model("qwen3")))

    def soft(texts: list[str]) -> Any:
        return encoder.encode(texts, return_soft_prompts=True)

    for name, read in (("decode", encoder.decode), ("explain", encoder.explain), ("return_soft_prompts=True", soft)):
        with pytest.raises(InputError, match=f"^{name} needs mode='llm2vec-gen', the mode is 'echo'"):
            read(["a"])


def test_what_cannot_be_read_is_refused(gen: Any) -> None:
    encoder = gen()
    with pytest.raises(InputError, match=r"soft prompts of shape \(2, 3, 31\): they are \(n, N, 32\)"):
        encoder.decode(soft_prompts=np.zeros((2, 3, 31), np.float32))
    with pytest.raises(InputError, match="either texts or soft_prompts"):
        encoder.decode()
    with pytest.raises(InputError, match="either texts or soft_prompts"):
        encoder.decode(["a"], soft_prompts=np.zeros((1, 3, 32), np.float32))
    with pytest.raises(InputError, match="max_new_tokens=0"):
        encoder.decode(["a"], max_new_tokens=0)
    with pytest.raises(InputError, match="top_k=0"):
        encoder.explain(["a"], top_k=0)
    with pytest.raises(InputError, match=r"texts\[1\] is None"):
        encoder.decode(["a", None])


def test_with_lora_the_plain_lm_answers(tiny_model: Tiny, tmp_path: Path) -> None:
    """The adapter shapes the embedding and is out of the way when the embedding is read."""
    base = tiny_model("qwen3")
    torch.manual_seed(0)
    layer = "base_model.model.layers.0.self_attn.q_proj"
    lora = {f"{layer}.lora_A.weight": torch.randn(4, 32), f"{layer}.lora_B.weight": torch.randn(32, 4)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": r"layers\.0\.self_attn\.q_proj"}
    tokens = tiny.token_set(base, tmp_path / "set", lora_config=config, lora=lora)
    settings = {"model": str(base), "mode": "llm2vec-gen", "dtype": "float32"}
    adapted = Encoder(**settings, token_set=str(tokens))
    plain = Encoder(**settings, token_set=str(tiny.token_set(base, tmp_path / "plain")))
    soft = adapted.encode(TEXTS, return_soft_prompts=True)[1]
    assert np.abs(soft - plain.encode(TEXTS, return_soft_prompts=True)[1]).max() > 0.01
    assert backbone_of(adapted) is not backbone_of(plain)
    expected = [reference.answer(base, row, 12, end={0}) for row in soft]
    with torch.inference_mode():
        assert backbone_of(adapted).generate(torch.from_numpy(soft), 12) == expected
    np.testing.assert_array_equal(adapted.encode(TEXTS, return_soft_prompts=True)[1], soft)  # and is back afterwards


def test_out_of_memory_halves_the_batch_and_goes_on(gen: Any) -> None:
    encoder = gen()
    expected = encoder.decode(TEXTS, max_new_tokens=6)
    soft = encoder.encode(TEXTS, return_soft_prompts=True)[1]
    most = 2

    def little_memory(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("inputs_embeds")
        if len(kwargs["input_ids"] if inputs is None else inputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = backbone_of(encoder).lm.register_forward_pre_hook(little_memory, with_kwargs=True)
    try:
        assert encoder.decode(soft_prompts=soft, max_new_tokens=6) == expected
        most = 0
        with pytest.raises(EncodingError, match="one answer of 6 tokens does not fit into the memory of cpu"):
            encoder.decode(soft_prompts=soft, max_new_tokens=6)
    finally:
        handle.remove()


def test_arrays_of_texts_are_lists_too(gen: Any) -> None:
    encoder = gen()
    assert encoder.decode(np.array(TEXTS), max_new_tokens=4) == encoder.decode(TEXTS, max_new_tokens=4)
