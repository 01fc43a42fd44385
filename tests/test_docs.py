"""Every example in a docstring runs and gives what it says."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import echo_integrations

ROOMS = sorted(path.stem for path in Path(echo_integrations.__file__).parent.glob("*.py") if path.stem != "__main__")


@pytest.mark.parametrize("room", ROOMS)
def test_docstring_examples(room: str) -> None:
    module = echo_integrations if room == "__init__" else import_module(f"echo_integrations.{room}")
    assert doctest.testmod(module).failed == 0
