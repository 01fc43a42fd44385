"""The released layout: read, written, and read back by plain peft and torch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from echo_integrations.config import TokenSetError
from echo_integrations.encoder import Encoder
from echo_integrations.token_set import TokenSet
from tests import tiny

Tiny = Callable[[str], Path]


def plainly(folder: Path, base: Path, text: str) -> np.ndarray[Any, Any]:
    """The embedding that a checkpoint in the released layout gives, with peft and torch alone."""
    run = yaml.safe_load((folder / "run_config.yml").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(AutoConfig.from_pretrained(folder / "encoder").vocab_size)
    model = PeftModel.from_pretrained(model, folder / "encoder").eval()
    heads = []
    for name in ("reconstruction_mlp", "alignment_mlp"):
        saved = torch.load(folder / name, weights_only=True)
        linear = torch.nn.Linear(saved["config"]["input_dim"], saved["config"]["output_dim"])
        linear.load_state_dict({k.removeprefix("projection."): v for k, v in saved["state_dict"].items()})
        heads.append(linear)
    ids = tokenizer(text)["input_ids"] + tokenizer.convert_tokens_to_ids(run["special_tokens"])
    count = int(run["encoding_mode"].split("_")[1])
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0, -count:]
        vector: np.ndarray[Any, Any] = heads[1](heads[0](hidden)).mean(0).numpy()
    return vector


def encoder_of(token_set: Path, base: Path) -> Encoder:
    return Encoder(
        model=str(base),
        token_set=str(token_set),
        mode="llm2vec-gen",
        dtype="float32",
        normalize_embeddings=False,
        document_instruction="",
    )


@pytest.mark.parametrize("backbone", ["llama", "qwen3"])
def test_exported_and_read_by_others_it_is_the_same(backbone: str, data: Path, tmp_path: Path) -> None:
    base = data / backbone / "base"
    tokens = TokenSet.load(data / backbone / "llm2vec_gen")
    tokens.export_released(tmp_path / "out", model=str(base))
    expected = np.load(data / backbone / "gen.npz")["emb|512"]
    texts = json.loads((data / "texts.json").read_text())["texts"]
    for row in (0, 4, 7):
        assert (
            np.abs(plainly(tmp_path / "out", base, texts[row]) - expected[row]).max() <= 1e-5 * np.abs(expected).max()
        )
    back = TokenSet.load(tmp_path / "out")
    assert back.fingerprint == tokens.fingerprint and back.special_tokens == tokens.special_tokens
    vectors = encoder_of(tmp_path / "out", base).encode(texts)
    assert np.abs(vectors - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("backbone", ["llama", "qwen3"])
def test_converted_to_our_own_format_it_is_the_same(backbone: str, data: Path, tmp_path: Path) -> None:
    TokenSet.load(data / backbone / "llm2vec_gen").save(tmp_path / "own")
    texts = json.loads((data / "texts.json").read_text())["texts"]
    expected = np.load(data / backbone / "gen.npz")["emb|512"]
    vectors = encoder_of(tmp_path / "own", data / backbone / "base").encode(texts)
    assert np.abs(vectors - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_set_of_ones_own_can_be_exported(tiny_model: Tiny, tmp_path: Path) -> None:
    """Its names, backbone and rows come along; gpt2 calls its embedding matrix something else."""
    for name in ("qwen3", "gpt2"):
        own = tiny.token_set(tiny_model(name), tmp_path / name)
        TokenSet.load(own).export_released(tmp_path / f"{name}-released")
        ours = encoder_of(own, tiny_model(name)).encode("the pump valve")
        theirs = plainly(tmp_path / f"{name}-released", tiny_model(name), "the pump valve")
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
        found = Encoder(model=str(tmp_path / f"{name}-released"), mode="llm2vec-gen", dtype="float32")
        assert found.encode("a").shape == (24,)  # run_config.yml names the backbone


def test_nothing_but_the_two_heads_is_a_pickle(data: Path, tmp_path: Path) -> None:
    tokens = TokenSet.load(data / "llama" / "llm2vec_gen")
    tokens.export_released(tmp_path / "out", model=str(data / "llama" / "base"))
    zips = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file() and p.read_bytes()[:2] in (b"PK", b"\x80\x02")}
    assert zips == {"reconstruction_mlp", "alignment_mlp"}


# --- LoRA with trained tokens inside


@pytest.fixture
def lora_checkpoint(tiny_model: Tiny, tmp_path: Path) -> Path:
    """A released checkpoint with a LoRA adapter, its encoder written by peft itself."""
    base = tiny_model("qwen3")
    own = tiny.token_set(base, tmp_path / "own", special_tokens=tuple(f"<question{i}>" for i in range(1, 6)))
    folder = tmp_path / "released"
    TokenSet.load(own).export_released(folder)
    rows = TokenSet.load(own).rows
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list(TokenSet.load(own).special_tokens))
    model = AutoModel.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(max(ids) + 1)
    torch.manual_seed(3)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        trainable_token_indices={"embed_tokens": ids},
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.copy_(rows)
    shutil.rmtree(folder / "encoder")
    wrapped.save_pretrained(folder / "encoder")
    AutoConfig.from_pretrained(base, vocab_size=max(ids) + 1).save_pretrained(folder / "encoder")
    return folder


def test_a_lora_checkpoint_gives_pefts_vectors(lora_checkpoint: Path, tiny_model: Tiny, nothing_loaded: None) -> None:
    base = tiny_model("qwen3")
    expected = plainly(lora_checkpoint, base, "the pump valve")
    vector = encoder_of(lora_checkpoint, base).encode("the pump valve")
    assert np.abs(vector - expected).max() <= 1e-5 * np.abs(expected).max()
    without = encoder_of(lora_checkpoint.parent / "own", base).encode("the pump valve")
    assert np.abs(vector - without).max() > 0.01  # the adapter matters


def test_a_lora_set_survives_both_formats(lora_checkpoint: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    base = tiny_model("qwen3")
    expected = plainly(lora_checkpoint, base, "the pump valve")
    tokens = TokenSet.load(lora_checkpoint)
    tokens.save(tmp_path / "saved")
    tokens.export_released(tmp_path / "again", model=str(base))
    for folder in (tmp_path / "saved", tmp_path / "again"):
        vector = encoder_of(folder, base).encode("the pump valve")
        assert np.abs(vector - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(plainly(tmp_path / "again", base, "the pump valve") - expected).max() <= 1e-5 * np.abs(expected).max()


# --- damage


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    """A released checkpoint that a test may change."""
    return Path(shutil.copytree(data / "llama" / "llm2vec_gen", tmp_path / "copy"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("arbitrary code ran",)


def test_a_pickle_that_runs_code_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Evil(), "config": {}}, copy / "alignment_mlp")
    with pytest.raises(
        TokenSetError, match="alignment_mlp cannot be read as a linear map .it holds more than tensors.*do not trust it"
    ):
        TokenSet.load(copy)
    assert "arbitrary" not in capsys.readouterr().out


@pytest.mark.parametrize("part", ["reconstruction_mlp", "alignment_mlp", "encoder/adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_no_part_is_skipped(copy: Path, part: str, how: str) -> None:
    content = (copy / part).read_bytes()
    (copy / part).unlink()
    if how == "cut":
        (copy / part).write_bytes(content[: len(content) // 2])
    with pytest.raises(TokenSetError, match="cannot be read"):
        TokenSet.load(copy)


def test_a_deeper_head_is_refused_not_cut(copy: Path) -> None:
    saved = torch.load(copy / "alignment_mlp", weights_only=True)
    saved["state_dict"]["second.weight"] = torch.zeros(2, 2)
    torch.save(saved, copy / "alignment_mlp")
    with pytest.raises(TokenSetError, match="only a single linear map"):
        TokenSet.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding_mode": "mean"}, "encoding_mode 'mean' with 20 special_tokens is none that can be read"),
        ({"encoding_mode": "last_21_tokens"}, "last_21_tokens"),
        ({"special_tokens": None}, "cannot be read"),
        ({"special_tokens": ["<no_such_token>"]}, "special_tokens is none that can be read"),
        ({"special_tokens": [f"<no_{i}>" for i in range(20)]}, "no row for <no_0>, <no_1>"),
    ],
)
def test_a_run_config_that_cannot_be_followed(copy: Path, change: dict[str, Any], message: str) -> None:
    config = yaml.safe_load((copy / "run_config.yml").read_text())
    (copy / "run_config.yml").write_text(yaml.safe_dump({**config, **change}))
    with pytest.raises(TokenSetError, match=message):
        TokenSet.load(copy)


def test_rows_follow_their_tokens_not_their_order(copy: Path, data: Path) -> None:
    """The adapter may list token ids in any order."""
    expected = TokenSet.load(data / "llama" / "llm2vec_gen").rows
    path = copy / "encoder" / "adapter_model.safetensors"
    tensors, config = load_file(path), json.loads((copy / "encoder" / "adapter_config.json").read_text())
    key = next(key for key in tensors if key.endswith("trainable_tokens_delta"))
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, path)
    config["token_indices"] = config["token_indices"][::-1]
    (copy / "encoder" / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(TokenSet.load(copy).rows, expected)


def test_another_kind_of_adapter_is_refused(copy: Path) -> None:
    path = copy / "encoder" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "IA3"}))
    with pytest.raises(TokenSetError, match="type IA3: only TRAINABLE_TOKENS and LORA"):
        TokenSet.load(copy)


def test_names_that_the_tokenizer_has_already_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    names = ("<|im_end|>", "<b>", "<c>", "<d>", "<e>")
    own = tiny.token_set(tiny_model("qwen3"), tmp_path / "own", special_tokens=names)
    with pytest.raises(TokenSetError, match=r"has <\|im_end\|> already"):
        TokenSet.load(own).export_released(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_writes_the_layout_that_is_read(tiny_model: Tiny, tmp_path: Path) -> None:
    """A TrainableTokens adapter as peft saves it, in place of the one that export wrote."""
    own = tiny.token_set(tiny_model("llama"), tmp_path / "own")
    tokens = TokenSet.load(own)
    tokens.export_released(tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(list(tokens.special_tokens))
    model = AutoModel.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    model.resize_token_embeddings(max(ids) + 1)
    wrapped = get_peft_model(model, TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=ids))
    for name, parameter in wrapped.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.copy_(tokens.rows)
    shutil.rmtree(tmp_path / "out" / "encoder")
    wrapped.save_pretrained(tmp_path / "out" / "encoder")
    assert torch.equal(TokenSet.load(tmp_path / "out").rows, tokens.rows)
