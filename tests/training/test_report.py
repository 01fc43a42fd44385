"""The report of a training: what is drawn and said, and that the page stands alone whatever it is given."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echo_integrations.config import InputError
from echo_integrations.files import FileError
from echo_integrations.training import figures
from echo_integrations.training.figures import Agreement
from echo_integrations.training.report import FILES, write_report

NAN = float("nan")
CONFIG = {"model": "Qwen/Qwen3-0.6B", "teacher": "MiniLM", "seed": 7, "thought_tokens": 3, "compression_tokens": 2}
SAMPLES = [
    {"step": step, "query": f"query {i}", "response": f"response {i}", "decoded": f"reading {i} at {step}"}
    for step in (0, 50, 100)
    for i in range(2)
]


def history(steps: int = 100) -> list[dict[str, float]]:
    """A loss of 100 / step, of which the terms are four fifths and a fifth, and two validations."""
    rows: list[dict[str, float]] = [{"step": 0, "validation_cosine": 0.1, "validation_recall_at_1": 0.25}]
    for step in range(1, steps + 1):
        loss = 100 / step
        rows.append({"step": step, "loss": loss, "reconstruction": 0.8 * loss, "alignment": 0.2 * loss})
        rows[-1]["learning_rate"] = 3e-4 * step / steps
    return [*rows, {"step": steps, "validation_cosine": 0.75, "validation_recall_at_1": 0.5}]


def similarities(count: int = 4) -> dict[str, Any]:
    """On the diagonal 0, 0.75 and 1, elsewhere 0.25."""
    matrices = {name: np.full((count, count), 0.25, dtype=np.float32) for name in ("teacher", "after", "before")}
    for name, own in {"before": 0.0, "after": 0.75, "teacher": 1.0}.items():
        np.fill_diagonal(matrices[name], own)
    return matrices


def report(folder: Path, rows: list[dict[str, float]] | None = None, **changes: Any) -> str:
    """The page of a report that is quickly drawn, unless told otherwise."""
    arguments: dict[str, Any] = {"config": CONFIG, "versions": {"torch": "2.13.0"}, "data": {"rows": 90}}
    arguments |= {"samples": SAMPLES, **changes}
    rows = [{"step": 1, "loss": 9.0}] if rows is None else rows
    return write_report(folder, rows, **arguments).read_text(encoding="utf-8")


def full_report(folder: Path) -> str:
    return report(folder, history(), similarities=similarities())


class Elements(HTMLParser):
    """Tags with their attributes, the text, and whether what was opened was closed again, in order."""

    VOID = ("meta", "img", "link", "br", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self.open[-1:] == ["style"] else data + " "

    def named(self, name: str) -> Iterator[dict[str, str | None]]:
        return (attributes for tag, attributes in self.tags if tag == name)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return full_report(tmp_path_factory.mktemp("report"))


def test_all_files_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    arguments: Any = {"versions": {}, "data": {}, "samples": SAMPLES, "similarities": similarities()}
    assert write_report(folder, history(), config=CONFIG, **arguments) == folder / "index.html"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for name in ("loss.png", "validation.png", "similarity.png"):
        with Image.open(folder / name) as image:
            image.load()
            assert image.width > 1000
            assert len(np.unique(np.asarray(image.convert("L")))) > 20  # something is drawn


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    code = "import sys; from tests.training.test_report import Path, full_report; full_report(Path(sys.argv[1]))"
    full_report(tmp_path / "a")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_final_numbers_are_stated(page: str) -> None:
    text = Elements(page).text
    last = sum(100 / step for step in range(96, 101)) / 5  # the last twentieth of 100 values
    for said in (
        "Qwen/Qwen3-0.6B",
        "MiniLM",
        "3 thought, 2 compression",
        "0.750 from 0.100",
        "50.0% from 25.0%",
        f"{last:.2f} from 100",
        "mean of the last 5 values",
        "The loss went from 100 to 1.02 in 100 steps.",
        "50% find their own response first (0.10 and 25% at step 0)",
    ):
        assert said in text.replace("  ", " "), said


def test_similarities_are_stated_on_and_off_the_diagonal(page: str) -> None:
    maps = [attributes["alt"] for attributes in Elements(page).named("img")]
    assert maps == [
        "Before: heat map of cosines; mean on the diagonal 0.000, elsewhere 0.250",
        "After: heat map of cosines; mean on the diagonal 0.750, elsewhere 0.250",
        "Teacher: heat map of cosines; mean on the diagonal 1.000, elsewhere 0.250",
    ]
    assert "0.000 1.000" in Elements(page).text  # the ends of the common scale


def test_heat_maps_share_one_scale() -> None:
    from io import BytesIO

    low, high = figures.bounds(similarities().values())
    assert (low, high) == (0.0, 1.0)
    pixels = {}
    for name, matrix in similarities().items():
        with Image.open(BytesIO(figures.heat_map(matrix, low, high))) as image:
            pixels[name] = np.asarray(image.convert("RGB")).astype(int)
    assert pixels["before"].shape == (4, 4, 3)
    assert (pixels["before"][0, 1] == pixels["after"][0, 1]).all()  # 0.25 in both
    assert tuple(pixels["before"][0, 0]) == (68, 1, 84)  # the lowest colour of viridis
    assert tuple(pixels["teacher"][0, 0]) == (253, 231, 36)  # the highest


def test_samples_are_a_table_of_early_and_late(page: str) -> None:
    heads = re.findall(r'<th role="columnheader" scope="col">(.*?)</th>', page)
    assert heads == ["Query", "Read at step 0", "Read at step 100", "The response"]
    table = page[page.index('<table class="samples"') : page.index("All readings")]
    assert re.findall(r"(?:reading|response) \d[^<]*", table) == [
        *("reading 0 at 0", "reading 0 at 100", "response 0"),
        *("reading 1 at 0", "reading 1 at 100", "response 1"),
    ]
    assert "reading 1 at 50" in page[page.index("All readings") :]


def test_long_and_empty_texts_of_the_table(tmp_path: Path) -> None:
    sample = {"step": 1, "query": "q", "response": "word " * 500, "decoded": " \n"}
    text = Elements(report(tmp_path, samples=[sample])).text
    assert "word word…" in text and len(re.findall(r"\bword\b", text)) == 60
    assert "nothing" in text


def test_the_record_is_exact(tmp_path: Path) -> None:
    page = report(tmp_path, config={**CONFIG, "path": Path("/a"), "names": {"b", "a"}, "nested": {"x": 1e-5}})
    record = Elements(page).text
    for said in ("seed: 7", "path: /a", "- a\n- b", "nested:\n  x: 1.0e-05", "torch: 2.13.0", "rows: 90"):
        assert said in record


def test_texts_are_data(tmp_path: Path) -> None:
    evil = "<script>alert(\"1\")</script><img src=x onerror='a()'> & \ud800 </style> $\\frac{$"
    page = report(
        tmp_path,
        [{"step": 1, "loss": 1.0, f"validation_{evil}": 0.5}],
        config={"model": evil, "teacher": evil, evil: evil},
        versions={evil: evil},
        data={evil: [evil]},
        similarities={"after": np.eye(2, dtype=np.float32)},
        samples=[{"step": 1, "query": evil, "response": evil, "decoded": evil}],
    )
    elements = Elements(page)
    assert not list(elements.named("script")) and len(list(elements.named("img"))) == 1
    assert elements.text.count('<script>alert("1")</script>') >= 8


def test_the_page_stands_alone(page: str) -> None:
    elements = Elements(page)
    assert {tag for tag, _ in elements.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    for tag, attributes in elements.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset"):
                assert (value or "").startswith(("data:", "#")), (tag, value)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#(.*?)\)", page)) <= set(ids)


def test_the_page_is_accessible(page: str) -> None:
    elements = Elements(page)
    assert next(elements.named("html"))["lang"] == "en"
    assert all(attributes["alt"] for attributes in elements.named("img"))
    charts = [attributes for attributes in elements.named("svg") if attributes.get("role") == "img"]
    assert len(charts) == 2 and all(attributes["aria-label"] for attributes in charts)
    levels = [int(tag[1]) for tag, _ in elements.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


def luminance(colour: str) -> float:
    """Of WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("theme", "paper"), [(0, "#f6f7f9"), (1, "#181e26")])  # the lower contrast of page and card
def test_colours_have_contrast(page: str, theme: int, paper: str) -> None:
    assert paper in page
    for name, pair in figures.COLOURS.items():
        assert pair[theme] in page
        lighter, darker = sorted((luminance(pair[theme]), luminance(paper)), reverse=True)
        if name != "grid":
            assert (lighter + 0.05) / (darker + 0.05) >= (4.5 if name in ("ink", "muted", "orange") else 3.0), name


def test_charts_take_the_colours_of_the_page(page: str) -> None:
    charts = "".join(re.findall(r'<svg role="img".*?</svg>', page, re.DOTALL))
    assert "stroke: var(--blue)" in charts and "stroke: var(--green)" in charts
    assert not re.search(r"(fill|stroke): #", charts)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_histories(tmp_path: Path, count: int) -> None:
    rows = [{"step": step, "loss": 2.0, "learning_rate": 0.0} for step in range(1, count + 1)]
    page = report(tmp_path, rows, samples=[], config={}, data={}, versions={})
    assert ("2.00" in Elements(page).text) == bool(count)
    expected = {"index.html", "history.jsonl"} | ({"loss.png"} if count else set())
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert "None" not in page and "nan" not in page


def test_rows_that_are_not_finite(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": NAN, "alignment": math.inf}, {"step": 3, "loss": 1.0}]
    text = Elements(report(tmp_path, rows)).text
    assert "1 of 3 rows hold NaN or infinity, the first at step 2." in text
    assert "1.00 from 3.00" in text.replace("  ", " ")
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [rows[0], {"step": 2, "loss": None, "alignment": None}, rows[2]]


def test_nothing_finite_at_all(tmp_path: Path) -> None:
    matrix = np.full((3, 3), NAN, dtype=np.float32)
    report(tmp_path, [{"step": 1, "loss": NAN, "validation_cosine": NAN}], similarities={"after": matrix})
    assert {path.name for path in tmp_path.iterdir()} == set(FILES) - {"loss.png", "validation.png"}


def test_long_histories_stay_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=20_000)
    rows = [{"step": step, "loss": 5.0 + value} for step, value in enumerate(noise.tolist())]
    page = report(tmp_path, rows, samples=[])
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 20_000
    assert len(page) < 200_000


def test_large_similarities_show_their_first_queries(tmp_path: Path) -> None:
    page = report(tmp_path, similarities=similarities(500))
    assert "the first 96 of 500 held-out queries" in page
    assert len(page) < 400_000


def test_one_query(tmp_path: Path) -> None:
    page = report(tmp_path, similarities={"after": np.array([[0.5]], dtype=np.float32)})
    assert "mean on the diagonal 0.500, elsewhere –" in page


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"later": np.zeros((2, 2), dtype=np.float32)}, "here are later"),
        ({"after": np.zeros((2, 3), dtype=np.float32)}, "square"),
        ({"after": np.zeros((2, 2), dtype=np.float32), "before": np.zeros((3, 3), dtype=np.float32)}, "of one size"),
    ],
)
def test_similarities_that_make_no_sense(tmp_path: Path, matrices: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        report(tmp_path / "report", similarities=matrices)
    assert not (tmp_path / "report").exists()


def test_a_report_replaces_its_forerunner_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    full_report(tmp_path)
    report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "loss.png", "history.jsonl", "index.html"}


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="file cannot be written"):
        report(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_missing_matplotlib_says_the_pip_line(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["matplotlib"] = None
from pathlib import Path
from tests.training.test_report import report
try:
    report(Path({str(tmp_path / "report")!r}))
except ModuleNotFoundError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 'pip install "echo-integrations[train]"' in run.stdout
    assert not (tmp_path / "report").exists()


def test_settings_and_figures_of_the_user_stay(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import matplotlib
matplotlib.rcParams["font.size"] = 33
from tests.training.test_report import report
report(Path({str(tmp_path)!r}))
print(matplotlib.rcParams["font.size"], "matplotlib.pyplot" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["33.0", "False"]
    (tmp_path / "other").mkdir()
    report(tmp_path / "other")
    assert (tmp_path / "loss.png").read_bytes() == (tmp_path / "other" / "loss.png").read_bytes()


def test_series_of_a_resumed_run() -> None:
    rows = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 3, "x": 1.0}]
    steps, values = figures.series(rows, "loss")
    assert steps.tolist() == [1, 2] and values.tolist() == [5.0, 3.0]


def test_smoothing_is_a_moving_mean() -> None:
    values = np.random.default_rng(0).normal(size=200)
    for place, mean in enumerate(figures.smooth(values)):
        before = min(5, place)
        assert mean == pytest.approx(values[place - before : place + before + 1].mean(), abs=1e-12)


def test_faint_lines_keep_their_peaks() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    places = figures.extremes(values, 100)
    assert len(places) <= 200 and (np.diff(places) > 0).all()
    assert {int(values.argmin()), int(values.argmax())} <= set(places.tolist())


def test_agreement() -> None:
    matrix = np.array([[0.9, 0.1, 0.2], [0.3, 0.2, 0.1], [0.0, 0.5, 0.5]], dtype=np.float32)
    agreement = Agreement.of(matrix)
    assert agreement.own == pytest.approx(1.6 / 3)
    assert agreement.others == pytest.approx(1.2 / 6)
    assert agreement.first == pytest.approx(1 / 3)  # the third has an equal beside it


def test_the_best_of_a_loss_is_its_lowest(tmp_path: Path) -> None:
    values = [(0, 3.0, 0.5), (10, 1.0, 0.9), (20, 2.0, 0.7)]
    rows = [{"step": s, "validation_reconstruction": r, "validation_cosine": c} for s, r, c in values]
    text = Elements(report(tmp_path, rows)).text
    assert "best 1.00 at step 10" in text and "best 0.900 at step 10" in text


@pytest.mark.parametrize(("lowest", "scale"), [(1.0, "linear"), (0.1, "log"), (-1.0, "linear")])
def test_wide_ranges_get_a_logarithmic_scale(lowest: float, scale: str) -> None:
    rows = [{"step": 1, "loss": 10.0}, {"step": 2, "loss": lowest}]
    with figures.style():
        figure = figures.loss_figure(rows)
    assert figure is not None and figure.axes[0].get_yscale() == scale
