import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from echo_integrations.config import InputError, Mode, Pooling, TemplateError
from echo_integrations.recipe import PRESETS, Ids, Piece, Recipe, TokenRecipe, parse_template, resolve_template


class Characters:
    """A tokenizer whose ids are code points; ``<s>`` and ``</s>`` are special tokens 1 and 2."""

    bos, eos, anchor_id = "<s>", "</s>", 1

    def __init__(self, prefix: Sequence[int] = ()) -> None:
        self.prefix = np.array(prefix, dtype=np.int32)

    def split_special(self, text: str) -> list[tuple[str, bool]]:
        return [(piece, piece in ("<s>", "</s>")) for piece in re.split("(</?s>)", text) if piece]

    def literal(self, text: str) -> Ids:
        ids: list[int] = []
        for piece, special in self.split_special(text):
            ids += [{"<s>": 1, "</s>": 2}[piece]] if special else map(ord, piece)
        return np.array(ids, dtype=np.int32)

    def plain(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array([ord(c) for c in text], dtype=np.int32) for text in texts]


def ids(text: str) -> list[int]:
    return Characters().literal(text).tolist()


def test_pieces_of_a_template() -> None:
    assert parse_template("Say {!%%prompt%%, %%text%%}: {%%text%%}{</s>}!") == (
        Piece(("Say ",), pooled=False),
        Piece(("", "prompt", ", ", "text", ""), pooled=False),
        Piece((": ",), pooled=False),
        Piece(("", "text", ""), pooled=True),
        Piece(("</s>",), pooled=True),
        Piece(("!",), pooled=False),
    )


@pytest.mark.parametrize(
    ("template", "position", "fault"),
    [
        ("plain text", 0, "no braces"),
        ("", 0, "no braces"),
        ("say {%%text%%", 4, "without '}'"),
        ("say %%text%%}", 12, "without '{'"),
        ("{%%text%%}}", 10, "without '{'"),
        ("{a {%%text%%}}", 3, "inside braces"),
        ("{%%text%%} and {%%tekst%%}", 16, "unknown variable %%tekst%%"),
        ("{!%%query%%}{%%text%%}", 2, "unknown variable %%query%%"),
        ("ab %%text%% {%%text%%}", 3, "outside braces"),
        ("{%%text%%} %%prompt%%", 11, "outside braces"),
        ("{%%text%%}{}", 10, "empty braces"),
        ("{%%text%%}{!}", 10, "empty braces"),
        ("{!%%text%%} {</s>}{!%%text%%", 18, "without '}'"),
        ("{hello}", 0, "no {%%text%%}"),
        ("{!%%text%%}", 0, "nothing is pooled"),
    ],
)
def test_a_bad_template_is_refused_with_the_position(template: str, position: int, fault: str) -> None:
    with pytest.raises(TemplateError, match=f"position {position}: .*{re.escape(fault)}"):
        parse_template(template)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("bos", "eos"), [("<s>", "</s>"), ("", "</s>"), ("", "")])
def test_presets_use_the_backbones_own_tokens_or_nothing(preset: str, bos: str, eos: str) -> None:
    template = resolve_template(preset, Mode.ECHO, bos, eos)
    assert "bos>" not in template and "eos>" not in template
    assert template.startswith(bos)
    assert template.endswith("{</s>}") == (bool(eos) and preset.startswith("fine-tuned"))
    parse_template(template)


def test_the_presets_are_the_papers() -> None:
    assert resolve_template(None, Mode.ECHO, "", "") == (
        "Rewrite the following paragraph: {!%%text%%}. The rewritten paragraph: {%%text%%}"
    )
    assert resolve_template(None, Mode.CLASSICAL, "", "") == "{%%text%%}"
    assert resolve_template("fine-tuned-query", Mode.ECHO, "<s>", "</s>") == (
        "<s>Instruct:{!%%prompt%%,}\nQuery:{!%%text%%}\nQuery again:{%%text%%}{</s>}"
    )
    assert resolve_template("<s>{%%text%%}", Mode.ECHO, "[B]", "[E]") == "<s>{%%text%%}"  # a user's is verbatim


def test_layout_and_pooled_span() -> None:
    rendered = Recipe("<s>A {!%%text%%} B {%%text%%}{</s>}", Characters(), 99).render(["xyz"])[0]
    assert rendered.ids.tolist() == [1, *ids("A xyz B xyz"), 2]
    assert rendered.spans == ((9, 12), (12, 13))
    assert rendered.length == 3


def test_both_copies_are_cut_alike_and_literals_never() -> None:
    rendered = Recipe("Long literal {!%%text%%}|{%%text%%}{</s>}", Characters(), 2).render(["xyz"])[0]
    assert rendered.ids.tolist() == [*ids("Long literal xy|xy"), 2]
    assert rendered.length == 3


def test_max_length_is_clamped_to_the_positions() -> None:
    recipe = Recipe("ab{!%%text%%}c{%%text%%}", Characters(), 512, positions=20)
    assert recipe.max_length == 8  # (20 - 3) // 2
    assert len(recipe.render(["x" * 100])[0].ids) == 19
    with pytest.raises(TemplateError, match="3 tokens of its own, the backbone has 4 positions"):
        Recipe("ab{!%%text%%}c{%%text%%}", Characters(), 512, positions=4)


@pytest.mark.parametrize(
    ("template", "expected", "span"),
    [
        ("A{!%%text%%}B{%%text%%}", ids("AB"), (1, 2)),  # the token before the span
        ("{%%text%%}", [1], (0, 1)),  # nothing before it: BOS
        ("{%%text%%}Z", [1, ord("Z")], (0, 1)),
        ("<s>{%%text%%}", [1], (0, 1)),
        ("{%%text%%}{</s>}", [2], (0, 1)),  # the template pools a token of its own
    ],
)
def test_an_empty_text_pools_the_token_before_its_place(
    template: str, expected: list[int], span: tuple[int, int]
) -> None:
    rendered = Recipe(template, Characters(), 9).render([""])[0]
    assert rendered.ids.tolist() == expected
    assert rendered.spans == (span,)


def test_instruction_fills_its_place() -> None:
    recipe = Recipe("{!%%prompt%%: }{%%text%%}", Characters(), 99)
    assert recipe.render(["x"], "Do")[0].ids.tolist() == ids("Do: x")
    assert recipe.render(["x"])[0].ids.tolist() == ids(": x")


def test_an_instruction_without_a_place_is_refused() -> None:
    with pytest.raises(InputError, match="no place for it"):
        Recipe("{%%text%%}", Characters(), 9).render([], "Do")


HOSTILE = st.text(alphabet=st.sampled_from(list("{}%!<s>/ textprompt\n")))


@given(HOSTILE, HOSTILE)
@example("%%text%%", "%%prompt%%")
@example("</s>{!%%text%%}", "%%text%%</s>")
def test_user_text_is_data(text: str, instruction: str) -> None:
    """Whatever a text holds stands there character by character, once a copy, and is never special."""
    recipe = Recipe("<s>I {!%%prompt%%} {!%%text%% and</s>}{%%text%%}", Characters(), 999)
    rendered = recipe.render([text], instruction)[0]
    plain_text, plain_instruction = list(map(ord, text)), list(map(ord, instruction))
    expected = [1, *ids("I "), *plain_instruction, *ids(" "), *plain_text, *ids(" and"), 2, *plain_text]
    assert rendered.ids.tolist() == expected
    if text:
        assert rendered.spans == ((len(expected) - len(text), len(expected)),)


@given(st.text(alphabet="{}%!texprom ab<s>/", max_size=40))
def test_any_template_is_read_or_refused_with_a_position(template: str) -> None:
    try:
        pieces = parse_template(template)
    except TemplateError as error:
        assert re.search(r"position \d+", str(error))
    else:
        assert any(piece.pooled for piece in pieces)
        assert any("text" in piece.variables for piece in pieces)


def test_last_pools_the_last_of_the_pooled_positions() -> None:
    recipe = Recipe("{!%%text%%}|{%%text%%}", Characters(), 99, pooling=Pooling.LAST)
    assert recipe.render(["abc"])[0].spans == ((6, 7),)
    assert recipe.render([""])[0].spans == ((0, 1),)  # the literal before its place


# --- trained tokens after a text


def test_trained_tokens_stand_at_the_end_and_the_last_are_read() -> None:
    rendered = TokenRecipe(Characters(), tokens=5, compression=2, max_length=99).render(["xyz"])[0]
    assert rendered.ids.tolist() == ids("xyz")
    assert (rendered.tail, rendered.size, rendered.spans, rendered.length) == (5, 8, ((6, 8),), 3)


def test_the_tokenizers_own_prefix_is_kept() -> None:
    rendered = TokenRecipe(Characters([1]), 2, 1, 99).render(["ab"])[0]
    assert rendered.ids.tolist() == [1, *ids("ab")]


@pytest.mark.parametrize("instruction", ["Do:", "Do: ", "Do:  \n"])
def test_instruction_and_text_are_joined_by_one_space(instruction: str) -> None:
    recipe = TokenRecipe(Characters(), 2, 1, 99)
    assert recipe.render(["it"], instruction)[0].ids.tolist() == ids("Do: it")


@pytest.mark.parametrize("instruction", ["", " "])
def test_no_instruction_adds_nothing(instruction: str) -> None:
    assert TokenRecipe(Characters(), 2, 1, 99).render(["it"], instruction)[0].ids.tolist() == ids("it")


def test_a_text_spelling_a_special_token_is_plain_text() -> None:
    rendered = TokenRecipe(Characters(), 2, 1, 99).render(["<s></s>"])[0]
    assert rendered.ids.tolist() == [ord(c) for c in "<s></s>"]


def test_an_empty_text_is_trained_tokens_alone() -> None:
    rendered = TokenRecipe(Characters(), 3, 3, 99).render([""])[0]
    assert (rendered.ids.tolist(), rendered.spans, rendered.size) == ([], ((0, 3),), 3)


def test_no_room_for_a_text_is_refused() -> None:
    assert TokenRecipe(Characters(), 5, 2, 6).max_length == 1
    with pytest.raises(InputError, match="max_length=5 leave no room for a text beside 5 trained tokens: .* 6"):
        TokenRecipe(Characters(), 5, 2, 5)
    with pytest.raises(InputError, match="and 1 of the tokenizer: give at least 7"):
        TokenRecipe(Characters([1]), 5, 2, 6)
    with pytest.raises(InputError, match="the 5 positions of the model leave no room"):
        TokenRecipe(Characters(), 5, 2, 512, positions=5)


@given(text=st.text(max_size=40), instruction=st.text(max_size=9), tokens=st.integers(1, 6), data=st.data())
def test_every_trained_token_survives_truncation(text: str, instruction: str, tokens: int, data: st.DataObject) -> None:
    max_length = data.draw(st.integers(tokens + 2, 40))
    compression = data.draw(st.integers(1, tokens))
    recipe = TokenRecipe(Characters([1]), tokens, compression, max_length)
    rendered = recipe.render([text], instruction)[0]
    full = [1, *map(ord, f"{instruction.rstrip()} {text}" if instruction.strip() else text)]
    assert rendered.length == len(full)
    assert rendered.ids.tolist() == full[: max_length - tokens]
    assert rendered.size == len(rendered.ids) + tokens <= max_length
    assert rendered.spans == ((rendered.size - compression, rendered.size),)
