"""The rooms of the package: imports go down only, and importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import echo_integrations

PACKAGE = Path(echo_integrations.__file__).parent
FLOORS = [
    {"config", "worker"},
    {"recipe", "batching", "tokenizer", "device", "prefix"},
    {"checkpoint", "released", "files", "texts", "pooling"},
    {"token_set"},
    {"backbone", "resolve"},
    {"forward", "reading", "registry"},
    {"pipeline"},
    {"encoder"},
    {"adapter"},
    {"langchain", "llama_index", "chroma"},
    {"training.config", "training.losses", "training.journal", "training.figures", "training.data"},
    {"training.model", "training.answering", "training.teacher", "training.evaluation", "training.page"},
    {"training.batches", "training.responses", "training.report"},
    {"training.validation", "training.loop"},
    {"training.trainer"},
    {"flags"},
    {"training.commands"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    """``training/data.py`` -> ``training.data``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def file_of(room: str) -> Path:
    return PACKAGE / f"{room.replace('.', '/')}.py"


def imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        found |= {name.removeprefix("echo_integrations.") for name in names if name.startswith("echo_integrations.")}
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_imports_go_down_only(room: str) -> None:
    for other in imports(file_of(room)) & FLOOR.keys():
        assert FLOOR[other] < FLOOR[room], f"{room} imports {other}"


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_every_room_is_small(room: str) -> None:
    assert len(file_of(room).read_text(encoding="utf-8").splitlines()) <= 500


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_is_light() -> None:
    heavy = ("torch", "transformers", "langchain_core", "llama_index", "chromadb", "numpy", "pydantic")
    assert run(f"import sys, echo_integrations as e; dir(e); print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_the_encoder_needs_no_framework() -> None:
    code = "import sys; from echo_integrations import Encoder; Encoder(); print([m for m in {} if m in sys.modules])"
    assert run(code.format(("langchain_core", "llama_index", "chromadb", "pyarrow"))) == "[]"


@pytest.mark.parametrize(
    ("room", "module", "extra"),
    [
        ("langchain", "langchain_core", "langchain"),
        ("llama_index", "llama_index", "llama-index"),
        ("chroma", "chromadb", "chroma"),
    ],
)
def test_a_missing_extra_says_the_pip_line(room: str, module: str, extra: str) -> None:
    code = f"""
import sys
sys.modules[{module!r}] = None
try:
    import echo_integrations.{room}
except ModuleNotFoundError as error:
    print(error)
"""
    assert f'pip install "echo-integrations[{extra}]"' in run(code)


def test_public_names_are_there() -> None:
    for name in echo_integrations.__all__:
        assert getattr(echo_integrations, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        echo_integrations.nothing  # noqa: B018
