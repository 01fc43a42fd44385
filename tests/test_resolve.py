"""Which backbone and token set settings mean."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from echo_integrations.config import ModelLoadError, TokenSetError, TokenSetMismatchError
from echo_integrations.encoder import Encoder
from echo_integrations.resolve import resolve
from tests import tiny
from tests.test_checkpoint import hub_cache

Tiny = Callable[[str], Path]


def gen(**settings: Any) -> Encoder:
    return Encoder(**{"mode": "llm2vec-gen", "dtype": "float32", **settings})


@pytest.fixture
def own(tiny_model: Tiny, tmp_path: Path) -> Path:
    """A token set of the tiny Qwen3."""
    return tiny.token_set(tiny_model("qwen3"), tmp_path / "own")


@pytest.fixture
def released(data: Path, tmp_path: Path) -> Path:
    """A released checkpoint that names its backbone by path."""
    folder = Path(shutil.copytree(data / "llama" / "llm2vec_gen", tmp_path / "released"))
    config = yaml.safe_load((folder / "run_config.yml").read_text())
    config["model_name_or_path"] = str(data / "llama" / "base")
    (folder / "run_config.yml").write_text(yaml.safe_dump(config))
    return folder


def test_a_released_checkpoint_finds_its_backbone(released: Path, data: Path) -> None:
    alone = gen(model=str(released))
    named = gen(model=str(data / "llama" / "base"), token_set=str(released))
    assert resolve(alone) == resolve(named)
    assert alone.fingerprint == named.fingerprint and alone.dimension == 64
    np.testing.assert_array_equal(alone.encode("a"), named.encode("a"))


def test_a_token_set_alone_finds_its_backbone(own: Path, tiny_model: Tiny) -> None:
    expected = gen(model=str(tiny_model("qwen3")), token_set=own)
    for encoder in (gen(token_set=own), gen(model=str(own)), gen(token_set=str(own))):
        assert resolve(encoder)[0] == resolve(expected)[0]
        assert encoder.fingerprint == expected.fingerprint
        np.testing.assert_array_equal(encoder.encode("a"), expected.encode("a"))


def test_a_released_checkpoint_with_a_token_set_beside_it_is_refused(released: Path, own: Path) -> None:
    with pytest.raises(
        ValidationError, match="is a released checkpoint with tokens of its own, and token_set= was given"
    ):
        gen(model=str(released), token_set=own)


def test_a_released_checkpoint_from_the_hub(released: Path, own: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(released, tmp_path / "cache", "McGill/Gen")
    gen_on_hub = {"model": "McGill/Gen", "cache_folder": str(tmp_path / "cache")}
    np.testing.assert_array_equal(gen(**gen_on_hub).encode("a"), gen(model=str(released)).encode("a"))
    assert snapshot.is_dir()
    with pytest.raises(ModelLoadError, match="LLM2Vec-Gen checkpoint: use it with .* no token_set="):
        gen(**gen_on_hub, token_set=own).encode("a")  # on the Hub it is seen when it is used
    with pytest.raises(ModelLoadError, match="LLM2Vec-Gen checkpoint: use it with mode='llm2vec-gen'"):
        Encoder(**gen_on_hub).encode("a")


def test_a_backbone_that_is_not_here_is_named(data: Path) -> None:
    with pytest.raises(ModelLoadError, match="'BASE' is no folder here"):
        gen(model=str(data / "llama" / "llm2vec_gen")).encode("a")


def test_another_backbone_is_refused(own: Path, tiny_model: Tiny) -> None:
    encoder = gen(model=str(tiny_model("llama")), token_set=own)
    for use in (lambda: encoder.encode("a"), lambda: encoder.fingerprint, lambda: encoder.dimension):
        with pytest.raises(TokenSetMismatchError, match="trained on '.*qwen3.*', the model is '.*llama"):
            use()


def test_a_model_without_tokens_asks_for_some(tiny_model: Tiny) -> None:
    with pytest.raises(
        TokenSetError, match="brings no trained tokens, which mode 'llm2vec-gen' needs: give token_set="
    ):
        gen(model=str(tiny_model("qwen3"))).encode("a")


def test_no_room_for_a_text_is_refused_at_construction(own: Path, released: Path) -> None:
    gen(token_set=own, max_length=6)
    for settings, tokens in (({"token_set": own}, 5), ({"model": str(own)}, 5), ({"model": str(released)}, 20)):
        with pytest.raises(ValidationError, match=f"max_length={tokens} leaves no room .* {tokens} trained tokens"):
            gen(**settings, max_length=tokens)


def test_what_is_no_token_set_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(TokenSetError, match="holds no token set"):
        gen(token_set=tmp_path)


def test_constructing_asks_no_hub() -> None:
    encoder = gen(model="McGill-NLP/LLM2Vec-Gen-Qwen3-8B")
    assert encoder.replace(token_set="legal/tokens").token_set == "legal/tokens"
    with pytest.raises(ModelLoadError, match="the Hugging Face Hub did not give it"):
        encoder.encode("a")


def test_a_token_set_belongs_to_its_mode(own: Path) -> None:
    with pytest.raises(ValidationError, match="token_set belongs to mode='llm2vec-gen', the mode is 'echo'"):
        Encoder(token_set=own)


@pytest.mark.parametrize("setting", [{"query_template": "classical"}, {"pooling": "last"}])
def test_the_mode_has_no_templates_and_no_choice_of_pooling(own: Path, setting: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(setting))} cannot be chosen in mode 'llm2vec-gen'"):
        gen(token_set=own, **setting)
    assert gen(token_set=own, pooling="mean", query_template=None).pooling == "mean"


def test_a_revision_that_would_be_ignored_is_refused(own: Path) -> None:
    with pytest.raises(ValidationError, match="token_set_revision was given without token_set"):
        gen(model="echo-mini", token_set_revision="v1")
    with pytest.raises(ValidationError, match="revision is the model's, and no model is named"):
        gen(token_set=own, revision="v1")
