import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, TorchAoConfig

from echo_integrations.backbone import BackboneSpec
from echo_integrations.checkpoint import Checkpoint
from echo_integrations.config import EncodingError, ModelLoadError, Role
from echo_integrations.device import choose_device, choose_dtype, is_out_of_memory
from echo_integrations.encoder import Encoder
from echo_integrations.registry import Registry, registry
from echo_integrations.resolve import recipe_of, resolve
from tests import tiny
from tests.conftest import backbone_of

Tiny = Callable[[str], Path]


def spec_of(encoder: Encoder) -> BackboneSpec:
    return BackboneSpec.of(encoder, Checkpoint.find(encoder))


def test_hidden_states_do_not_see_the_padding_or_the_neighbours(tiny_model: Tiny) -> None:
    backbone = backbone_of(Encoder(model=str(tiny_model("llama")), dtype="float32"))
    short, long = np.array([5, 6, 7], dtype=np.int32), np.arange(40, dtype=np.int32)
    with torch.inference_mode():
        alone = backbone.hidden_states([short])
        together = backbone.hidden_states([long, short])
    assert together.shape == (2, 40, 32)
    np.testing.assert_allclose(together[1, :3], alone[0], atol=1e-5)


def test_the_lm_head_is_not_loaded(tiny_model: Tiny) -> None:
    model = backbone_of(Encoder(model=str(tiny_model("llama")))).model
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def test_a_token_without_an_embedding_row_is_an_error_not_a_crash(tiny_model: Tiny) -> None:
    backbone = backbone_of(Encoder(model=str(tiny_model("qwen3"))))
    with pytest.raises(EncodingError, match="gave token 99999"):
        backbone.hidden_states([np.array([1, 99999], dtype=np.int32)])


def test_a_bidirectional_model_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path)
    for file in tiny_model("qwen3").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelLoadError, match=r"\(bert\) is not a causal LM"):
        Encoder(model=str(tmp_path)).encode("a")


def test_model_kwargs_reach_transformers(tiny_model: Tiny) -> None:
    with pytest.raises(ModelLoadError, match="no_such_argument"):
        Encoder(model=str(tiny_model("qwen3")), model_kwargs={"no_such_argument": 1}).encode("a")


def test_attn_implementation_reaches_the_model(tiny_model: Tiny) -> None:
    encoder = Encoder(model=str(tiny_model("qwen3")), attn_implementation="eager")
    assert backbone_of(encoder).model.config._attn_implementation == "eager"


def test_a_compiled_model_gives_the_same(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the backend that runs the captured graph as it is: seeing to code generation is torch's own affair."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings: dict[str, Any] = {"model": str(tiny_model("qwen3")), "dtype": "float32"}
    tokens = tiny.token_set(settings["model"], tmp_path / "tokens")
    for mode in ({"mode": "classical"}, {"mode": "llm2vec-gen", "token_set": str(tokens)}):  # the latter with a prefix
        plain, compiled = Encoder(**settings, **mode), Encoder(**settings, **mode, compile=True)
        assert compiled.fingerprint == plain.fingerprint
        for texts in (["a", "the pump leaked", "rain"], ["a longer text than those"], ["a"]):
            np.testing.assert_allclose(compiled.encode(texts), plain.encode(texts), atol=1e-6)
    said = [record.message for record in caplog.records if "compile=True" in record.message]
    assert len(said) == 2 and "may take minutes" in said[0] and "compiled in" in said[1]
    compiled.unload()


def test_int8_weights_stay_close(mini: Callable[..., Encoder]) -> None:
    torchao = pytest.importorskip(
        "torchao.quantization", reason="the int8 extra is installed by make test-lowest only: it is noisy when imported"
    )

    def int8() -> dict[str, Any]:
        return {"quantization_config": TorchAoConfig(torchao.Int8WeightOnlyConfig())}

    texts = ["the pump", "a valve leaked and nobody looked at the gauge", "rain"]
    plain, quantised = mini(mode="classical"), mini(mode="classical", model_kwargs=int8())
    assert (plain.encode(texts) * quantised.encode(texts)).sum(axis=1).min() > 0.999
    assert plain.fingerprint != quantised.fingerprint == mini(mode="classical", model_kwargs=int8()).fingerprint
    quantised.unload()


# --- sharing


def test_threads_that_ask_at_once_load_once(tiny_model: Tiny) -> None:
    ours = Registry()
    spec = spec_of(Encoder(model=str(tiny_model("qwen3"))))
    barrier = threading.Barrier(8)
    users, got = [threading.Event() for _ in range(8)], []

    def ask(user: object) -> None:
        barrier.wait()
        got.append(ours.acquire(spec, user))

    threads = [threading.Thread(target=ask, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8 and len({id(backbone) for backbone in got}) == 1  # each load would give another
    for user in users[:-1]:
        ours.release(user)
    assert ours.loaded() == [spec]
    ours.release(users[-1])
    assert ours.loaded() == []


def test_a_pass_under_way_survives_unload(tiny_model: Tiny, nothing_loaded: None) -> None:
    encoder = Encoder(model=str(tiny_model("qwen3")), dtype="float32", token_budget=60)
    texts = [f"valve {i}" for i in range(6)]
    expected = encoder.encode(texts)
    batches = encoder.encode_batches(texts)
    result = np.empty_like(expected)
    for positions, vectors in batches:
        encoder.unload()
        result[positions] = vectors
    np.testing.assert_array_equal(result, expected)
    assert registry.loaded() == []


# --- adapters


def lora(folder: Path, target: Path, with_head: bool) -> Any:
    """A LoRA adapter with random weights, trained, so to speak, on the model with or without its head."""
    torch.manual_seed(1)
    auto = AutoModelForCausalLM if with_head else AutoModel
    config = LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM" if with_head else None
    )
    model = get_peft_model(auto.from_pretrained(folder, dtype=torch.float32), config)
    model.save_pretrained(target)
    return model


@pytest.mark.parametrize("with_head", [True, False])
def test_an_adapter_is_merged(with_head: bool, tiny_model: Tiny, tmp_path: Path, nothing_loaded: None) -> None:
    folder = tiny_model("llama")
    lora(folder, tmp_path, with_head)
    settings: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "mode": "classical",
        "normalize_embeddings": False,
    }
    adapted, plain = Encoder(**settings, adapter=str(tmp_path)), Encoder(**settings)
    auto = AutoModelForCausalLM if with_head else AutoModel
    unmerged = PeftModel.from_pretrained(auto.from_pretrained(folder, dtype=torch.float32), tmp_path)
    base = unmerged.base_model.model.model if with_head else unmerged.base_model.model
    recipe = recipe_of(adapted, Role.DOCUMENT, *resolve(adapted))
    ids = torch.tensor(np.array([recipe.render(["the pump"])[0].ids]))
    with torch.no_grad():
        expected = base(input_ids=ids).last_hidden_state[0, 1:].mean(0).numpy()
    vector = adapted.encode("the pump")
    assert np.abs(vector - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(plain.encode("the pump") - vector).max() > 0.01
    assert len(registry.loaded()) == 2  # a backbone of its own
    assert adapted.fingerprint != plain.fingerprint


def test_an_adapter_of_another_model_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    lora(tiny_model("llama"), tmp_path / "adapter", with_head=True)
    with pytest.raises(ModelLoadError, match="check that it was trained on that model"):
        Encoder(model=str(tiny_model("gpt2")), adapter=str(tmp_path / "adapter")).encode("a")


def test_an_adapter_that_lacks_a_tensor_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    lora(tiny_model("llama"), tmp_path, with_head=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="do not fit: .*lora_A"):
        Encoder(model=str(tiny_model("llama")), adapter=str(tmp_path)).encode("a")


def test_a_folder_that_is_no_adapter_is_refused(tiny_model: Tiny) -> None:
    with pytest.raises(ModelLoadError, match="not a PEFT adapter"):
        Encoder(model=str(tiny_model("llama")), adapter=str(tiny_model("llama"))).encode("a")


# --- device, dtype, memory


def test_a_device_that_is_not_here_is_named() -> None:
    for device in ("cuda:99", "no-such-device"):
        with pytest.raises(ModelLoadError, match=f"device '{device}' cannot be used here"):
            choose_device(device)


def test_auto_dtype_is_bfloat16_only_where_it_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for capabilities, expected in [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "amx_bf16": False}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert choose_dtype("auto", cpu) == expected
    assert choose_dtype("float16", cpu) == torch.float16


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not is_out_of_memory(RuntimeError("device-side assert triggered"))
    assert not is_out_of_memory(ValueError("out of memory"))
