"""Every example in a docstring runs and gives what it says."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import echo_integrations

PACKAGE = Path(echo_integrations.__file__).parent
ROOMS = sorted(
    ".".join(("echo_integrations", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__main__"
)


@pytest.mark.parametrize("room", ROOMS)
def test_docstring_examples(room: str) -> None:
    assert doctest.testmod(import_module(room)).failed == 0
