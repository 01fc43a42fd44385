import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from echo_integrations.checkpoint import Checkpoint
from echo_integrations.config import EncoderSettings, ModelLoadError
from echo_integrations.encoder import Encoder

Tiny = Callable[[str], Path]


def find(model: str | Path, **settings: Any) -> Checkpoint:
    return Checkpoint.find(EncoderSettings(model=str(model), **settings))


@pytest.fixture
def copy(tiny_model: Tiny, tmp_path: Path) -> Path:
    """A tiny Qwen3 that a test may change."""
    return Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))


def hub_cache(model: Path, cache: Path, repo: str) -> Path:
    """The Hub's cache folder after a download of ``repo``: links named like files to blobs named by hash."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / ("c0ffee" * 7)[:40]
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(snapshot.name)
    for file in (path for path in model.rglob("*") if path.is_file()):
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        if file.suffix != ".safetensors":
            name = name[:40]  # small files are named by their git hash
        shutil.copy(file, root / "blobs" / name)
        (snapshot / file.relative_to(model)).parent.mkdir(exist_ok=True)
        (snapshot / file.relative_to(model)).symlink_to(root / "blobs" / name)
    return snapshot


def test_the_built_in_model_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo-mini").mkdir()
    assert (find("echo-mini").hidden_size, find("echo-mini").positions) == (256, 2048)


def test_one_folder_by_two_names_is_one_checkpoint(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    assert find("./model") == find(copy) == find("model")
    assert hash(find("./model")) == hash(find(copy))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere-at-all", "a/b/c"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ModelLoadError, match="there is no folder") as caught:
        find(name)
    assert name in str(caught.value)


def test_a_file_is_no_folder(copy: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a file: name the folder"):
        find(copy / "config.json")


def test_without_a_network_the_message_says_what_to_do() -> None:
    with pytest.raises(ModelLoadError, match="'no-such/model-anywhere' is no folder here.*hf download.*token="):
        find("no-such/model-anywhere", revision="v1")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no config.json"):
        find(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="adapter="):
        find(tmp_path)


def test_a_hub_model_is_found_in_the_cache_offline(tiny_model: Tiny, tmp_path: Path) -> None:
    snapshot = hub_cache(tiny_model("qwen3"), tmp_path, "someone/some-model")
    checkpoint = find("someone/some-model", cache_folder=str(tmp_path))
    assert checkpoint.folder == snapshot
    encoder = Encoder(model="someone/some-model", cache_folder=str(tmp_path))
    assert encoder.encode("a").shape == (32,)
    # what was downloaded by hand into a folder is the same vector space
    assert encoder.fingerprint == Encoder(model=str(tiny_model("qwen3"))).fingerprint


def test_a_released_checkpoint_brings_its_templates(tiny_model: Tiny, tmp_path: Path) -> None:
    name = "jspringer/echo-mistral-7b-instruct-lasttoken"
    hub_cache(tiny_model("mistral"), tmp_path, name)
    space = Encoder(model=name, cache_folder=str(tmp_path)).vector_space()
    assert space["query_template"] == ("<s>Instruct:{!%%prompt%%,}\nQuery:{!%%text%%}\nQuery again:{%%text%%}{</s>}")
    assert space["document_template"] == "<s>Document:{!%%text%%}\nDocument again:{%%text%%}{</s>}"
    assert (space["pooling"], space["query_instruction"]) == ("last", True)


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="half-downloaded: model-00002-of-00002.safetensors"):
        Encoder(model=str(copy)).encode("a")


def test_the_file_that_transformers_loads_is_the_one_that_counts(copy: Path) -> None:
    """A stale index beside a whole file is not looked at."""
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert Encoder(model=str(copy)).encode("a").shape == (32,)


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no weights"):
        Encoder(model=str(copy)).encode("a")


def test_a_truncated_weight_file_is_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match="downloaded whole"):
        Encoder(model=str(copy)).encode("a")


def test_weights_that_lack_a_tensor_are_refused_not_invented(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="lack 1 of the model's tensors .*layers.1.mlp.up_proj.weight"):
        Encoder(model=str(copy)).encode("a")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_half_written_json_is_named(copy: Path, name: str) -> None:
    (copy / name).write_text((copy / name).read_text()[:50])
    with pytest.raises(ModelLoadError, match=name):
        Encoder(model=str(copy)).encode("a")


def test_a_missing_tokenizer_is_named(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelLoadError, match="has no tokenizer"):
        Encoder(model=str(copy)).encode("a")


def test_an_unknown_kind_of_model_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "from-the-future"}))
    with pytest.raises(ModelLoadError, match="newer transformers"):
        Encoder(model=str(copy)).encode("a")


REMOTE_CODE = """
from pathlib import Path
from transformers import Qwen3Config, Qwen3Model

class OwnConfig(Qwen3Config):
    model_type = "own-kind"

class OwnModel(Qwen3Model):
    config_class = OwnConfig
"""


def test_remote_code_runs_only_when_the_user_says_so(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "own-kind", "auto_map": auto_map}))
    (copy / "own.py").write_text(REMOTE_CODE)
    with pytest.raises(ModelLoadError, match="read that code, then pass trust_remote_code=True"):
        Encoder(model=str(copy)).encode("a")
    assert Encoder(model=str(copy), trust_remote_code=True, dtype="float32").encode("a").shape == (32,)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="encoder-decoder, not a causal LM"):
        Encoder(model=str(tmp_path)).encode("a")


def test_damaged_weights_are_called_so(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="gives NaN or infinity in float32: its weights are damaged"):
        Encoder(model=str(copy), dtype="float32").encode("a")


def test_a_model_narrower_at_its_end_has_that_dimension(tiny_model: Tiny, tmp_path: Path) -> None:
    """OPT-350M projects its hidden states down."""
    config = OPTConfig(
        vocab_size=600, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    for file in tiny_model("llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    encoder = Encoder(model=str(tmp_path), dtype="float32")
    assert encoder.encode(["a", "b c"]).shape == (2, 16) and encoder.dimension == 16


def test_a_folder_has_no_revisions(copy: Path) -> None:
    for name in (str(copy), "echo-mini"):
        with pytest.raises(ModelLoadError, match="has no revision 'v1'"):
            find(name, revision="v1")


# --- the digest


def test_digest_follows_contents_not_names_or_spellings(copy: Path) -> None:
    before = find(copy).digest()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**config, "transformers_version": "9.9", "dtype": "bfloat16"}, indent=1)
    )
    assert find(copy).digest() == before
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert find(copy).digest()["config"] != before["config"]


def test_digest_and_signature_see_one_changed_weight(copy: Path) -> None:
    digest, signature = find(copy).digest(), find(copy).signature
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    changed = find(copy).digest()
    assert {key for key in digest if digest[key] != changed[key]} == {"weights"}
    assert find(copy).signature != signature


def test_a_retrained_folder_is_loaded_anew(copy: Path) -> None:
    encoder = Encoder(model=str(copy), dtype="float32")
    before = encoder.encode("a")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * torch.linspace(0, 2, 32)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    changed = encoder.encode("a")
    assert abs(changed - before).max() > 0.01
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.0}))
    assert abs(encoder.encode("a") - changed).max() > 0.001  # vectors follow every file that the fingerprint follows
