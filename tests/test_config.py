import re

import pytest
import torch
from pydantic import ValidationError

from echo_integrations.config import EncoderSettings, Pooling, canonical_json


def test_the_defaults_are_the_documented_ones() -> None:
    settings = EncoderSettings()
    assert settings.settings() == {}
    assert {name: getattr(settings, name) for name in EncoderSettings.model_fields} == {
        "model_name": "echo-mini",
        "revision": None,
        "token": None,
        "cache_folder": None,
        "trust_remote_code": False,
        "device": None,
        "dtype": "auto",
        "attn_implementation": None,
        "compile": False,
        "adapter": None,
        "mode": "echo",
        "token_set": None,
        "token_set_revision": None,
        "query_template": None,
        "document_template": None,
        "query_instruction": None,
        "document_instruction": None,
        "pooling": "mean",
        "max_length": 512,
        "on_truncate": "warn",
        "normalize_embeddings": True,
        "truncate_dim": None,
        "token_budget": None,
        "show_progress": None,
        "model_kwargs": {},
    }


def test_model_is_an_alias_and_only_one_of_the_two_names_is_taken() -> None:
    assert EncoderSettings(model="a/b").model_name == EncoderSettings(model_name="a/b").model_name == "a/b"
    with pytest.raises(ValidationError, match="two names of one argument"):
        EncoderSettings(model="a", model_name="a")


@pytest.mark.parametrize(
    "bad",
    [
        {"modle": "x"},
        {"max_length": 0},
        {"max_length": "512"},
        {"max_length": True},
        {"truncate_dim": -1},
        {"token_budget": 0},
        {"dtype": "int8"},
        {"mode": "both"},
        {"mode": 3},
        {"pooling": "max"},
        {"on_truncate": "ignore"},
        {"model": ""},
        {"model_kwargs": {"torch_dtype": "float16"}},
        {"model_kwargs": {"weights_only": False}},
        {"model_kwargs": {"variant": "fp16"}},
        {"model_kwargs": {"device": "cpu"}},
    ],
)
def test_what_cannot_be_is_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        EncoderSettings(**bad)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model_nam", "did you mean model_name?"),
        ("batch_size", "did you mean token_budget?"),
        ("encode_kwargs", "normalize_embeddings"),
        ("qqq", "there are adapter, attn_implementation"),
    ],
)
def test_an_unknown_name_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(hint)):
        EncoderSettings(**{name: 1})


def test_settings_are_immutable_and_replace_validates() -> None:
    settings = EncoderSettings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.max_length = 3
    assert settings.replace(max_length=3).max_length == 3
    with pytest.raises(ValidationError, match="max_length"):
        settings.replace(max_length=0)
    assert settings.replace(model="a/b").model_name == settings.model_copy(update={"model": "a/b"}).model_name == "a/b"


def test_torch_objects_stand_for_their_names() -> None:
    settings = EncoderSettings(dtype=torch.bfloat16, device=torch.device("cuda:1"))
    assert (settings.dtype, settings.device) == ("bfloat16", "cuda:1")


def test_the_token_is_never_shown() -> None:
    settings = EncoderSettings(token="hf_secret")
    assert "secret" not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()
    assert settings.settings()["token"].get_secret_value() == "hf_secret"
    assert settings.replace(mode="classical").token == settings.token
    for bad in ({"token": "hf_secret", "max_length": 0}, {"tokn": "hf_secret"}, {"token": "hf_secret", "dtype": 3}):
        with pytest.raises(ValidationError) as caught:
            EncoderSettings(**bad)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["jspringer/echo-mistral-7b-instruct-lasttoken", "./echo-mistral-7b-instruct-lasttoken/"]
)
def test_released_checkpoints_bring_what_they_were_trained_with(name: str) -> None:
    settings = EncoderSettings(model=name)
    assert settings.query_template == "fine-tuned-query"
    assert settings.document_template == "fine-tuned-document"
    assert (settings.pooling, settings.max_length) == (Pooling.LAST, 300)
    assert settings.query_instruction == "Retrieve passages that answer the question"
    assert EncoderSettings(**settings.settings()) == settings


def test_what_the_user_says_wins_over_what_a_checkpoint_brings() -> None:
    name = "jspringer/echo-mistral-7b-instruct-meantoken"
    assert EncoderSettings(model=name).pooling is Pooling.MEAN
    assert EncoderSettings(model=name, max_length=64).max_length == 64
    assert EncoderSettings(model=name, mode="classical").query_template is None


def test_what_a_checkpoint_brings_comes_and_goes_with_it() -> None:
    name = "jspringer/echo-mistral-7b-instruct-lasttoken"
    released = EncoderSettings(model=name)
    assert EncoderSettings().replace(model=name) == released
    assert released.replace(model="echo-mini") == EncoderSettings(model="echo-mini")
    assert released.replace(mode="classical").query_template is None
    assert released.replace(mode="classical").pooling is Pooling.MEAN
    zero_shot = EncoderSettings(model=name, query_template="zero-shot")
    assert (zero_shot.query_instruction, zero_shot.pooling) == (None, Pooling.LAST)


def test_repr_shows_what_differs_from_the_defaults() -> None:
    settings = EncoderSettings(mode="classical", max_length=8)
    assert repr(settings) == "EncoderSettings(model_name='echo-mini', mode='classical', max_length=8)"


def test_canonical_json_ignores_order_and_takes_objects() -> None:
    class Quantization:
        def to_dict(self) -> dict[str, int]:
            return {"bits": 4}

    assert canonical_json({"b": Quantization(), "a": 1}) == canonical_json({"a": 1, "b": {"bits": 4}})
