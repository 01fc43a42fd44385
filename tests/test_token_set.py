import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from echo_integrations.checkpoint import Checkpoint
from echo_integrations.config import (
    EncoderSettings,
    InputError,
    ModelLoadError,
    Role,
    TokenSetError,
    TokenSetMismatchError,
)
from echo_integrations.token_set import TokenSet, count_tokens, is_token_set
from tests import tiny
from tests.test_checkpoint import hub_cache

Tiny = Callable[[str], Path]


def maps(hidden: int = 4, dimension: int = 3) -> dict[str, torch.Tensor]:
    return {
        "reconstruction.weight": torch.eye(hidden),
        "reconstruction.bias": torch.zeros(hidden),
        "alignment.weight": torch.ones(dimension, hidden),
        "alignment.bias": torch.arange(float(dimension)),
    }


def small(**changes: Any) -> TokenSet:
    given = {"rows": torch.arange(20.0).reshape(5, 4), "maps": maps(), "compression": 2, "backbone": "some/model"}
    return TokenSet(**{**given, **changes})


def checkpoint(folder: Path | str) -> Checkpoint:
    return Checkpoint.find(EncoderSettings(model=str(folder)))


# --- what a set is


def test_sizes_and_names() -> None:
    tokens = small()
    assert (tokens.hidden_size, tokens.dimension) == (4, 3)
    assert tokens.special_tokens == ("<thought_0>", "<thought_1>", "<thought_2>", "<compress_0>", "<compress_1>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": torch.zeros(5, 3)}, "do not fit together: rows .5, 3."),
        ({"rows": torch.zeros(5)}, "has rows"),
        ({"maps": {"alignment.weight": torch.zeros(3, 4)}}, "a token set has rows"),
        ({"compression": 6}, "6 of 5 trained tokens cannot be read"),
        ({"compression": 0}, "0 of 5 trained tokens cannot be read"),
        ({"rows": torch.full((5, 4), torch.nan)}, "rows of the token set holds NaN"),
        ({"special_tokens": ("<a>", "<a>", "<b>", "<c>", "<d>")}, "5 tokens have the names <a>, <a>"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenSetError, match=message):
        small(**changes)


def test_the_fingerprint_is_of_what_makes_the_vectors() -> None:
    same = small(backbone="other/name", teacher="x", training={"steps": 1}, instructions={Role.QUERY: "q"})
    assert small().fingerprint == same.fingerprint
    changed = maps()
    changed["alignment.bias"] = changed["alignment.bias"] + 1
    lora = {"lora_config": {"peft_type": "LORA", "r": 2}, "lora": {"a.lora_A.weight": torch.ones(2, 4)}}
    scaled = {**lora, "lora_config": {**lora["lora_config"], "alpha_pattern": {"a": 4}}}
    others = [small(compression=1), small(rows=torch.zeros(5, 4)), small(maps=changed), small(**lora), small(**scaled)]
    assert len({small().fingerprint, *(other.fingerprint for other in others)}) == 6
    moved = {**lora, "lora_config": {**lora["lora_config"], "base_model_name_or_path": "elsewhere"}}
    assert small(**moved).fingerprint == small(**lora).fingerprint


# --- on disk


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    tokens = small(
        revision="abc",
        backbone_identity={"hidden_size": 4, "weights": "w"},
        instructions={Role.QUERY: "Answer:", Role.DOCUMENT: "Sum up: é"},
        teacher="some/teacher",
        training={"steps": 5, "data": "sha"},
        lora_config={"peft_type": "LORA", "r": 2, "target_modules": {"q_proj", "k_proj"}},
        lora={"a.lora_A.weight": torch.ones(2, 4)},
    )
    tokens.save(tmp_path / "new" / "set")
    loaded = TokenSet.load(tmp_path / "new" / "set")
    assert loaded.fingerprint == tokens.fingerprint
    for name in ("compression", "backbone", "revision", "instructions", "teacher", "training", "special_tokens"):
        assert getattr(loaded, name) == getattr(tokens, name), name
    assert torch.equal(loaded.rows, tokens.rows) and loaded.backbone_identity == tokens.backbone_identity
    assert loaded.lora_config == {"peft_type": "LORA", "r": 2, "target_modules": ["k_proj", "q_proj"]}
    assert sorted(p.name for p in (tmp_path / "new" / "set").iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "token_set.json",
        "tokens.safetensors",
    ]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["set"]  # nothing temporary is left
    assert len({p.stat().st_mode for p in (tmp_path / "new" / "set").iterdir()}) == 1  # whoever reads one reads all
    card = (tmp_path / "new" / "set" / "README.md").read_text()
    assert "base_model: some/model" in card and "some/teacher" in card and "Answer:" in card


def test_loading_again_is_free_until_the_files_change(tmp_path: Path) -> None:
    small().save(tmp_path / "set")
    first = TokenSet.load(tmp_path / "set")
    assert TokenSet.load(str(tmp_path / "set")) is first
    small(compression=1).save(tmp_path / "set")
    assert TokenSet.load(tmp_path / "set").compression == 1


def test_the_header_is_enough_to_count_tokens(tmp_path: Path, data: Path) -> None:
    small().save(tmp_path / "set")
    (tmp_path / "set" / "tokens.safetensors").unlink()
    assert count_tokens(tmp_path / "set") == 5
    assert count_tokens(data / "llama" / "llm2vec_gen") == 20
    assert is_token_set(tmp_path / "set") and not is_token_set(data / "llama" / "base")
    with pytest.raises(TokenSetError, match="holds no token set"):
        count_tokens(data / "llama" / "base")


def test_saving_replaces_a_set_and_keeps_what_else_is_there(tmp_path: Path) -> None:
    lora = {"lora_config": {"peft_type": "LORA", "r": 2}, "lora": {"a.lora_A.weight": torch.ones(2, 4)}}
    small(**lora).save(tmp_path / "set")
    (tmp_path / "set" / "report").mkdir()
    (tmp_path / "set" / "report" / "loss.png").write_bytes(b"picture")
    small().save(tmp_path / "set")
    assert TokenSet.load(tmp_path / "set").lora_config is None
    assert (tmp_path / "set" / "report" / "loss.png").read_bytes() == b"picture"
    assert not (tmp_path / "set" / "adapter.safetensors").exists()


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds something else"):
        small().save(tmp_path)
    with pytest.raises(InputError, match="holds something else"):
        small().save(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    small().save(tmp_path / "empty")
    assert is_token_set(tmp_path / "empty")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small().save(tmp_path / "set")

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        small(compression=1).save(tmp_path / "set")
    assert TokenSet.load(tmp_path / "set").compression == 2
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


# --- damage


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(["tokens.safetensors", "adapter.safetensors"]))
def test_any_changed_or_missing_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: Any, name: str) -> None:
    folder = tmp_path_factory.mktemp("damage") / "set"
    small(lora_config={"peft_type": "LORA"}, lora={"a.lora_A.weight": torch.ones(2, 4)}).save(folder)
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    with pytest.raises(TokenSetError, match=f"{name} is damaged: its SHA-256 is not the one"):
        TokenSet.load(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 2000))
def test_a_header_that_ends_early_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: int) -> None:
    folder = tmp_path_factory.mktemp("damage") / "set"
    small().save(folder)
    header = (folder / "token_set.json").read_text().rstrip()
    (folder / "token_set.json").write_text(header[: place % len(header)])
    with pytest.raises(TokenSetError, match="cannot be read"):
        TokenSet.load(folder)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    small().save(tmp_path / "set")
    (tmp_path / "set" / "tokens.safetensors").unlink()
    with pytest.raises(TokenSetError, match=r"lacks tokens\.safetensors: copy it again"):
        TokenSet.load(tmp_path / "set")


@pytest.mark.parametrize("version", [2, "1.1", None])
def test_a_future_version_says_upgrade(tmp_path: Path, version: Any) -> None:
    small().save(tmp_path / "set")
    header = json.loads((tmp_path / "set" / "token_set.json").read_text())
    (tmp_path / "set" / "token_set.json").write_text(json.dumps({**header, "format_version": version}))
    with pytest.raises(TokenSetError, match=f"format version {version}, .* reads 1: upgrade"):
        TokenSet.load(tmp_path / "set")


def test_any_change_of_the_header_is_noticed(tmp_path: Path) -> None:
    small().save(tmp_path / "set")
    header = json.loads((tmp_path / "set" / "token_set.json").read_text())
    for change in ({"sha256": []}, {"compression_tokens": 1}, {"instructions": {"query": "Other:"}}, {"backbone": {}}):
        (tmp_path / "set" / "token_set.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(TokenSetError, match="is damaged or was edited: its checksum does not fit"):
            TokenSet.load(tmp_path / "set")


def test_no_set_at_all(tmp_path: Path) -> None:
    with pytest.raises(TokenSetError, match="holds no token set"):
        TokenSet.load(tmp_path)
    with pytest.raises(ModelLoadError, match="there is no folder './nothing'"):
        TokenSet.load("./nothing")
    with pytest.raises(ModelLoadError, match="the Hugging Face Hub did not give it"):
        TokenSet.load("nobody/nothing")


# --- the Hub


def test_a_set_on_the_hub(tmp_path: Path) -> None:
    small().save(tmp_path / "set")
    hub_cache(tmp_path / "set", tmp_path / "cache", "legal/tokens")
    loaded = TokenSet.load("legal/tokens", cache_folder=str(tmp_path / "cache"))
    assert loaded.fingerprint == small().fingerprint


def test_push_to_hub_uploads_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def create_repo(api: Any, repo_id: str, **kwargs: Any) -> None:
        seen.update(repo=repo_id, token=api.token, **kwargs)

    def upload_folder(api: Any, *, folder_path: str, **kwargs: Any) -> str:
        seen.update(kwargs, fingerprint=TokenSet.load(folder_path).fingerprint)
        return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert small().push_to_hub("legal/tokens", token="secret", private=True, revision="v2") == "https://hub/commit"
    assert (seen["repo"], seen["token"], seen["private"], seen["revision"]) == ("legal/tokens", "secret", True, "v2")
    assert seen["fingerprint"] == small().fingerprint and seen["exist_ok"]


# --- its backbone


@pytest.fixture
def trained(tiny_model: Tiny, tmp_path: Path) -> TokenSet:
    """A set of the tiny Qwen3."""
    return TokenSet.load(tiny.token_set(tiny_model("qwen3"), tmp_path / "trained"))


def test_its_own_backbone_fits_however_it_was_saved(trained: TokenSet, tiny_model: Tiny, tmp_path: Path) -> None:
    trained.check(checkpoint(tiny_model("qwen3")))
    folder = Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    trained.check(checkpoint(folder))
    half = Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "half"))
    save_file({k: v.bfloat16() for k, v in tensors.items()}, half / "model.safetensors", metadata={"format": "pt"})
    trained.check(checkpoint(half))


def test_a_fine_tuned_variant_is_another_backbone(trained: TokenSet, tiny_model: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "tuned"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TokenSetMismatchError, match="trained on '.*qwen3.*', the model is '.*tuned': .* in weights;"):
        trained.check(checkpoint(folder))


def test_another_backbone_is_refused_naming_both(trained: TokenSet, tiny_model: Tiny) -> None:
    with pytest.raises(TokenSetMismatchError) as caught:
        trained.check(checkpoint(tiny_model("llama")))
    assert all(str(tiny_model(name)) in str(caught.value) for name in ("qwen3", "llama"))
    assert "config, vocabulary, weights" in str(caught.value)
    with pytest.raises(TokenSetMismatchError, match=r"hidden size \(32 there, 256 here\)"):
        trained.check(checkpoint("echo-mini"))


def test_a_released_set_is_checked_by_size_and_vocabulary(tiny_model: Tiny, data: Path, tmp_path: Path) -> None:
    released = TokenSet.load(data / "llama" / "llm2vec_gen")
    released.check(checkpoint(data / "llama" / "base"))
    renamed = Path(shutil.copytree(data / "llama" / "base", tmp_path / "renamed"))
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = 3000
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenSetMismatchError, match="trained on 'BASE', the model is .*: they differ in vocabulary"):
        released.check(checkpoint(renamed))
    with pytest.raises(TokenSetMismatchError, match="hidden size .64 there, 32 here., vocabulary"):
        released.check(checkpoint(tiny_model("qwen3")))


def test_a_released_set_saved_in_our_format_knows_its_vocabulary(tiny_model: Tiny, data: Path, tmp_path: Path) -> None:
    TokenSet.load(data / "llama" / "llm2vec_gen").save(tmp_path / "own")
    saved = TokenSet.load(tmp_path / "own")
    saved.check(checkpoint(data / "llama" / "base"))
    with pytest.raises(TokenSetMismatchError, match="hidden size .64 there, 32 here., vocabulary"):
        saved.check(checkpoint(tiny_model("qwen3")))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_move_puts_the_old_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    small().save(tmp_path / "set")
    (tmp_path / "set" / "notes.txt").write_text("keep")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        small(compression=1).save(tmp_path / "set")
    assert TokenSet.load(tmp_path / "set").compression == 2
    assert (tmp_path / "set" / "notes.txt").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
