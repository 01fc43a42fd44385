import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the suite needs no model hub; read when huggingface_hub is imported

import pytest

from echo_integrations.backbone import Backbone, BackboneSpec
from echo_integrations.encoder import Encoder
from echo_integrations.registry import registry
from echo_integrations.resolve import resolve
from tests import tiny

DATA = Path(__file__).parent / "data"


def backbone_of(encoder: Encoder) -> Backbone:
    """The loaded model behind an encoder."""
    return registry.acquire(BackboneSpec.of(encoder, *resolve(encoder)), encoder)


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by architecture, built once a session; never to be changed."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = tiny.build(name, tmp_path_factory.mktemp(name))
        return built[name]

    return get


@pytest.fixture(scope="session")
def mini_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random token set of the built-in model; never to be changed."""
    return tiny.token_set("echo-mini", tmp_path_factory.mktemp("tokens") / "mini")


@pytest.fixture
def mini() -> Callable[..., Encoder]:
    """The built-in model in fp32, so that numbers agree on every CPU."""

    def make(**settings: Any) -> Encoder:
        return Encoder(**{"dtype": "float32", **settings})

    return make


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    """A process that has loaded no backbone yet."""
    registry.forget()
    yield
    registry.forget()
