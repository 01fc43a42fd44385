import logging
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from echo_integrations import checkpoint as checkpoint_module
from echo_integrations.config import EncodingError, InputError, Mode, Role, TruncationError, TruncationWarning
from echo_integrations.encoder import Encoder
from echo_integrations.registry import registry
from echo_integrations.resolve import recipe_of, resolve
from tests import tiny
from tests.conftest import backbone_of

Mini = Callable[..., Encoder]

TEXTS = [f"{'The pump stopped and ' * (i % 6)}valve {i % 17} leaked{'.' * (i % 3)}" for i in range(60)]


# --- what comes out


def test_shape_dtype_and_length(mini: Mini) -> None:
    vectors = mini().encode(["a", "b"])
    assert vectors.shape == (2, 256) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_encode_is_the_document_side(mini: Mini) -> None:
    encoder = mini(query_template="classical")
    np.testing.assert_array_equal(encoder.encode(["a"]), encoder.encode_document(["a"]))
    assert np.abs(encoder.encode_query(["a"]) - encoder.encode(["a"])).max() > 0.01
    np.testing.assert_array_equal(encoder.encode_query(["a"]), mini(mode="classical").encode(["a"]))


def test_one_string_is_one_vector(mini: Mini) -> None:
    vector = mini().encode("valve")
    assert vector.shape == (256,)
    np.testing.assert_array_equal(vector, mini().encode(["valve"])[0])


def test_nothing_gives_an_empty_array(mini: Mini) -> None:
    assert mini().encode([]).shape == (0, 256)
    assert mini(truncate_dim=8).encode_query([]).shape == (0, 8)
    assert list(mini().encode_iter([])) == []


def test_normalisation_and_truncation(mini: Mini) -> None:
    raw = mini(normalize_embeddings=False).encode(TEXTS[:3])
    assert np.linalg.norm(raw, axis=1).min() > 1.5
    np.testing.assert_allclose(mini().encode(TEXTS[:3]), raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
    cut = mini(truncate_dim=10).encode(TEXTS[:3])
    expected = raw[:, :10] / np.linalg.norm(raw[:, :10], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    with pytest.raises(InputError, match="truncate_dim=257 is more than the 256"):
        mini(truncate_dim=257).encode(["a"])


def test_bfloat16_stays_close(mini: Mini) -> None:
    cosine = (mini(dtype="bfloat16").encode(TEXTS) * mini().encode(TEXTS)).sum(axis=1)
    assert cosine.min() > 0.999


def test_numpy_arrays_tuples_and_generators_are_lists_too(mini: Mini) -> None:
    expected = mini().encode(["a", "b"])
    for texts in (("a", "b"), np.array(["a", "b"]), (t for t in "ab"), {"a": 1, "b": 2}.keys()):
        np.testing.assert_array_equal(mini().encode(texts), expected)


# --- a vector depends on its text alone


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(60)), budget=st.integers(1, 3000), data=st.data(), mode=st.sampled_from(list(Mode)))
def test_batch_neighbours_and_order_do_not_matter(
    mini: Mini, mini_tokens: Path, order: list[int], budget: int, data: st.DataObject, mode: Mode
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, 60), max_size=4)))
    settings = {"mode": mode, **({"token_set": mini_tokens} if mode is Mode.LLM2VEC_GEN else {})}
    expected = mini(**settings).encode(TEXTS)
    encoder = mini(**settings, token_budget=budget)
    texts = [TEXTS[i] for i in order]
    parts = [encoder.encode(texts[a:b]) for a, b in zip([0, *cuts], [*cuts, 60], strict=True)]
    assert np.abs(np.concatenate(parts) - expected[order]).max() <= 1e-5 * np.abs(expected).max()


def test_eight_threads_at_once(mini: Mini) -> None:
    encoder = mini()
    expected = encoder.encode(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: encoder.encode(TEXTS[i : i + 5]), range(0, 60, 5)))
    assert np.abs(np.concatenate(parts) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_threads_that_start_cold_load_one_model_and_tokenizer() -> None:
    """In a process of its own, because imports and loading must be cold, too."""
    code = """
import threading
from echo_integrations import Encoder
encoder, results, barrier = Encoder(), [], threading.Barrier(8)
def work():
    barrier.wait()
    results.append(encoder.encode("pump").tolist())
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(len(results), max(abs(a - b) for r in results for a, b in zip(r, results[0])) < 1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["8", "True"], done.stderr
    assert done.stderr.count("demonstration model") == 1 and "Error" not in done.stderr


def test_identical_texts_go_through_the_model_once(mini: Mini) -> None:
    encoder = mini(mode="classical")
    encoder.encode("warm")
    rows: list[int] = []
    handle = _model(encoder).register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        vectors = encoder.encode(["a", "b", "a", "a", "b"])
    finally:
        handle.remove()
    assert sum(rows) == 2
    assert np.array_equal(vectors[0], vectors[2]) and np.array_equal(vectors[0], vectors[3])
    assert np.array_equal(vectors[1], vectors[4]) and not np.array_equal(vectors[0], vectors[1])


def test_many_slices_come_back_in_order(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mini(mode="classical").encode(TEXTS)
    monkeypatch.setattr("echo_integrations.pipeline._SLICE", 7)
    monkeypatch.setattr("echo_integrations.pipeline._WINDOW", 25)
    np.testing.assert_allclose(mini(mode="classical").encode(TEXTS), expected, atol=2e-6)


def test_encode_iter_takes_a_stream_window_by_window(mini: Mini) -> None:
    taken = 0

    def stream() -> Iterator[str]:
        nonlocal taken
        for text in TEXTS:
            taken += 1
            yield text

    encoder = mini(mode="classical")
    windows = encoder.encode_iter(stream(), window_size=25)
    first = next(windows)
    assert taken == 25 and len(first) == 25
    rest = list(windows)
    assert [len(window) for window in rest] == [25, 10]
    np.testing.assert_allclose(np.concatenate([first, *rest]), encoder.encode(TEXTS), atol=2e-6)
    queries = np.concatenate(list(encoder.encode_iter(["a"], role="query")))
    np.testing.assert_array_equal(queries, encoder.encode_query(["a"]))


def test_a_window_without_room_is_refused(mini: Mini) -> None:
    with pytest.raises(InputError, match="window_size=0"):
        list(mini().encode_iter(["x"], window_size=0))


def test_encode_iter_numbers_items_from_the_streams_start(mini: Mini) -> None:
    with pytest.raises(InputError, match=r"texts\[4\] is None"):
        list(mini(mode="classical").encode_iter(["a", "b", "c", "d", None], window_size=2))  # type: ignore[list-item]


# --- user text is data


@pytest.mark.parametrize("spelling", ["<|im_end|>", "<|endoftext|>", "%%text%%", "{", "}", "!", "{!%%text%%}", "</s>"])
def test_a_spelling_changes_only_its_own_texts_tokens(mini: Mini, spelling: str) -> None:
    encoder = mini()
    tokenizer = resolve(encoder)[0].tokenizer
    recipe = recipe_of(encoder, Role.DOCUMENT, *resolve(encoder))
    text = f"a{spelling}b"
    plain = tokenizer.plain([text])[0].tolist()
    ids = recipe.render([text])[0].ids.tolist()
    head = tokenizer.literal("Rewrite the following paragraph: ").tolist()
    middle = tokenizer.literal(". The rewritten paragraph: ").tolist()
    assert ids == head + plain + middle + plain
    assert not {0, 1, 2, 3} & set(plain)  # echo-mini's special tokens


# --- instructions


def test_instructions_per_side_and_per_call(mini: Mini) -> None:
    template = "{!%%prompt%% }{%%text%%}"
    both = {"query_template": template, "document_template": template}
    encoder = mini(**both, query_instruction="Ask:", document_instruction="Say:")
    spelled = mini(query_template="{!Ask: }{%%text%%}", document_template="{!Say: }{%%text%%}")
    np.testing.assert_array_equal(encoder.encode_query(["x"]), spelled.encode_query(["x"]))
    np.testing.assert_array_equal(encoder.encode_document(["x"]), spelled.encode_document(["x"]))
    assert np.abs(encoder.encode_query(["x"]) - encoder.encode_document(["x"])).max() > 1e-3
    np.testing.assert_array_equal(encoder.encode_query(["x"], instruction="Say:"), encoder.encode_document(["x"]))
    np.testing.assert_array_equal(
        encoder.encode_query(["x"], instruction=""), mini(query_template=template).encode_query(["x"])
    )


def test_an_instruction_without_a_place_is_refused_before_anything_is_computed(mini: Mini) -> None:
    with pytest.raises(ValidationError, match="no place for it"):
        mini(query_instruction="Do")
    with pytest.raises(ValidationError, match="position 3: unknown variable %%tekst%%"):
        mini(document_template="a {%%tekst%%}")
    with pytest.raises(InputError, match="no place for it"):
        mini().encode_document(["a"], instruction="Do")
    with pytest.raises(InputError, match="instruction is int"):
        mini().encode_query(["a"], instruction=3)  # type: ignore[arg-type]


# --- truncation


def test_truncation_error_names_item_and_lengths(mini: Mini) -> None:
    with pytest.raises(TruncationError, match=r"texts\[1\] has 13 tokens, more than max_length=4"):
        mini(max_length=4, on_truncate="error").encode(["a", "x y z a b c d e f g h i j", "b"])


def test_an_instruction_that_is_too_long_is_called_one(mini: Mini) -> None:
    encoder = mini(max_length=4, query_template="{!%%prompt%% }{%%text%%}", on_truncate="error")
    with pytest.raises(TruncationError, match="the instruction has 8 tokens, more than max_length=4"):
        encoder.encode_query(["a"], instruction="a b c d e f g")


def test_truncation_warns_once_a_call(mini: Mini) -> None:
    with pytest.warns(TruncationWarning, match=r"texts\[\d\] has \d+ tokens, more than max_length=2") as caught:
        mini(max_length=2).encode(["a b c d", "a", "e f g h i"])
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the user's line, not one of ours


def test_a_text_longer_than_the_model_allows_is_not_told_to_raise_max_length(mini: Mini) -> None:
    with pytest.raises(TruncationError, match=r"more than the 1015 that the model allows: split it or") as caught:
        mini(max_length=100_000, on_truncate="error").encode(["a " * 3_000])
    assert "raise" not in str(caught.value)


def test_truncation_can_be_silent_and_short_texts_never_warn(mini: Mini) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut = mini(max_length=2, on_truncate="truncate").encode(["a b c d"])
        mini(max_length=4).encode(["a b c d"])
    np.testing.assert_allclose(cut, mini(max_length=2).encode(["a b"]), atol=1e-6)


# --- bad input


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts is None"),
        (7, "texts is int"),
        (b"bytes", "texts is bytes"),
        ({"a": 1}, "texts is dict"),
        (["a", None], r"texts\[1\] is None"),
        (["a", "b", 2.5], r"texts\[2\] is float '2.5'"),
        ([b"x"], r"texts\[0\] is bytes"),
        ([["a"]], r"texts\[0\] is list"),
        ({"a", "b"}, "texts is set"),
        (["ok", "bad \ud83d here"], r"texts\[1\] has a lone surrogate, '\\ud83d', at character 4"),
    ],
)
def test_what_is_no_text_is_named(mini: Mini, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mini().encode(texts)
    if not isinstance(texts, list):
        with pytest.raises(InputError, match=message):
            list(mini().encode_iter(texts))


@pytest.mark.parametrize("mode", ["echo", "classical"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_odd_texts_have_finite_vectors_of_their_own(mini: Mini, mode: str, pooling: str) -> None:
    texts = ["", " ", "\n\t", "\x00", "a\x00b", "🙂" * 10_000, "x" * 1_000_000, "\u202e\u0301", "�"]
    encoder = mini(mode=mode, pooling=pooling, on_truncate="truncate", max_length=64)
    vectors = encoder.encode(texts)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], encoder.encode([""])[0], atol=1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(st.text(max_size=30), max_size=6))
def test_any_text_has_a_unit_vector_of_its_own(mini: Mini, texts: list[str]) -> None:
    encoder = mini()
    vectors = encoder.encode(texts)
    assert vectors.shape == (len(texts), 256)
    for text, vector in zip(texts, vectors, strict=True):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(vector, encoder.encode(text), atol=1e-5)


def test_an_empty_text_pools_the_token_before_it(mini: Mini) -> None:
    empty = mini(pooling="last").encode("")
    before = mini(
        query_template="{!Rewrite the following paragraph: }{!%%text%%}{. The rewritten paragraph: }", pooling="last"
    )
    np.testing.assert_allclose(empty, before.encode_query(""), atol=1e-5)


def test_nan_is_an_error_that_names_the_text(mini: Mini) -> None:
    encoder = mini(mode="classical")
    encoder.encode("warm")

    def second_row_is_nan(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[1] = torch.nan
        return output

    handle = _model(encoder).norm.register_forward_hook(second_row_is_nan)
    try:
        with pytest.raises(EncodingError, match=r"NaN or infinity for texts\[2\].*float32"):
            encoder.encode(["a", "the longest of these texts", "a longer text"])  # goes through longest first
    finally:
        handle.remove()


@pytest.mark.parametrize("normalize", [True, False])
def test_a_zero_vector_is_an_error_not_an_answer(mini: Mini, normalize: bool) -> None:
    encoder = mini(mode="classical", normalize_embeddings=normalize)
    encoder.encode("warm")
    handle = _model(encoder).norm.register_forward_hook(lambda module, args, output: output * 0)
    try:
        with pytest.raises(EncodingError, match=r"zero vector for texts\[0\]"):
            encoder.encode(["a"])
    finally:
        handle.remove()


# --- memory


def test_out_of_memory_halves_the_budget_and_goes_on(mini: Mini, nothing_loaded: None) -> None:
    encoder = mini(mode="classical", token_budget=800)
    expected = encoder.encode(TEXTS)
    sizes: list[int] = []

    def little_memory(module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    handle = _model(encoder).register_forward_pre_hook(little_memory, with_kwargs=True)
    try:
        vectors = encoder.encode(TEXTS)
        failed = [size for size in sizes if size > 150]
        again = encoder.encode(TEXTS)
    finally:
        handle.remove()
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    np.testing.assert_allclose(again, expected, atol=2e-6)
    assert 1 <= len(failed) <= 3 and failed == sorted(failed, reverse=True)
    assert [size for size in sizes if size > 150] == failed  # the second call knows the smaller budget


def test_one_text_that_does_not_fit_is_named(mini: Mini, nothing_loaded: None) -> None:
    encoder = mini(mode="classical")
    encoder.encode("warm")

    def no_memory(module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].shape[1] > 20:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    handle = _model(encoder).register_forward_pre_hook(no_memory, with_kwargs=True)
    try:
        with pytest.raises(EncodingError, match=r"texts\[1\] alone, \d+ tokens .*lower max_length"):
            encoder.encode(["a", "the pump " * 30, "b"])
        assert encoder.encode(["a", "b"]).shape == (2, 256)
    finally:
        handle.remove()


def test_the_users_token_budget_is_the_bound(mini: Mini, nothing_loaded: None) -> None:
    texts = [f"valve {i}" for i in range(1200)]
    for budget, most in ((10, 10), (5_000, 5_000), (None, 2_048)):
        encoder = mini(mode="classical", token_budget=budget)
        sizes: list[int] = []
        handle = _model(encoder).register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        encoder.encode(texts[: 30 if budget == 10 else 1200])
        handle.remove()
        assert 0.6 * most < max(sizes) <= most


def test_other_errors_are_not_taken_for_lack_of_memory(mini: Mini, nothing_loaded: None) -> None:
    encoder = mini(mode="classical")
    encoder.encode("warm")

    def broken(module: Any, args: Any) -> None:
        raise RuntimeError("device-side assert triggered")

    handle = _model(encoder).register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="device-side assert"):
            encoder.encode(["a"])
    finally:
        handle.remove()


# --- the vector space


def test_fingerprint_does_not_depend_on_how_vectors_are_computed(mini: Mini) -> None:
    fingerprint = Encoder().fingerprint
    assert len(fingerprint) == 32 and int(fingerprint, 16) >= 0
    for same in (
        {"dtype": "bfloat16"},
        {"device": "cpu"},
        {"token_budget": 99},
        {"show_progress": True},
        {"on_truncate": "error"},
        {"attn_implementation": "eager"},
        {"cache_folder": "/nowhere"},
        {"model_kwargs": {"low_cpu_mem_usage": True}},
        {"document_template": "zero-shot"},
        {"query_instruction": ""},
    ):
        assert Encoder(**same).fingerprint == fingerprint, same


def test_fingerprint_changes_with_what_defines_the_vectors(tiny_model: Callable[[str], Path]) -> None:
    prompt = "{!%%prompt%%}{%%text%%}"
    variants: list[dict[str, Any]] = [
        {},
        {"mode": "classical"},
        {"pooling": "last"},
        {"max_length": 511},
        {"normalize_embeddings": False},
        {"truncate_dim": 128},
        {"query_template": "classical"},
        {"document_template": "classical"},
        {"model": str(tiny_model("qwen3"))},
        {"model_kwargs": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}},
        {"query_template": prompt},
        {"query_template": prompt, "query_instruction": "Ask"},
        {"document_template": prompt},
        {"document_template": prompt, "document_instruction": "Say"},
        {"document_template": prompt, "document_instruction": "Tell"},
    ]
    fingerprints = [Encoder(**variant).fingerprint for variant in variants]
    assert len(set(fingerprints)) == len(variants)
    reworded = Encoder(query_template=prompt, query_instruction="Ask me")
    assert reworded.fingerprint == Encoder(query_template=prompt, query_instruction="Ask").fingerprint


def test_fingerprint_ignores_the_dtype_that_a_quantisation_computes_in() -> None:
    def quantized(**more: Any) -> str:
        return Encoder(model_kwargs={"quantization_config": {"load_in_4bit": True, **more}}).fingerprint

    assert quantized() == quantized(bnb_4bit_compute_dtype="bfloat16") != quantized(bnb_4bit_quant_type="nf4")


def test_the_same_files_elsewhere_are_the_same_space(tmp_path: Path) -> None:
    copy = tmp_path / "another-name"
    shutil.copytree(checkpoint_module._ASSETS / "echo-mini", copy)
    assert Encoder(model=str(copy)).fingerprint == Encoder().fingerprint


def test_fingerprint_and_dimension_load_no_weights(nothing_loaded: None) -> None:
    encoder = Encoder()
    assert encoder.dimension == 256 and encoder.fingerprint
    assert registry.loaded() == []


# --- life of an encoder


def test_encoders_are_lazy_picklable_and_share_one_backbone(mini: Mini, nothing_loaded: None) -> None:
    encoder, other = mini(), mini(mode="classical", pooling="last", max_length=9)
    assert registry.loaded() == []
    expected = encoder.encode(["a"])
    other.encode(["a"])
    copy = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(copy.encode(["a"]), expected)
    assert copy == encoder and copy.fingerprint == encoder.fingerprint
    assert len(registry.loaded()) == 1
    assert _model(encoder) is _model(other) is _model(copy)


def test_unload_counts_references(mini: Mini, nothing_loaded: None) -> None:
    first, second = mini(), mini(mode="classical")
    expected = first.encode(["a"])
    second.encode(["a"])
    first.unload()
    first.unload()  # twice counts once
    assert len(registry.loaded()) == 1
    second.unload()
    assert registry.loaded() == []
    np.testing.assert_array_equal(first.encode(["a"]), expected)  # comes back at need
    assert len(registry.loaded()) == 1


def test_a_collected_encoder_counts_no_more_but_frees_nothing(mini: Mini, nothing_loaded: None) -> None:
    mini().encode(["a"])
    assert len(registry.loaded()) == 1
    last = mini()
    last.encode(["a"])
    last.unload()
    assert registry.loaded() == []


def test_other_dtypes_are_other_backbones(mini: Mini, nothing_loaded: None) -> None:
    mini().encode(["a"])
    mini(dtype="bfloat16").encode(["a"])
    assert sorted(spec.dtype for spec in registry.loaded()) == ["bfloat16", "float32"]


def _encode_in_child(encoder: Encoder, queue: Any) -> None:
    queue.put((len(registry.loaded()), encoder.encode(["pump", "valve"])))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("unloaded", [False, True])
def test_a_forked_worker_loads_anew_instead_of_hanging(mini: Mini, unloaded: bool) -> None:
    encoder = mini()
    expected = encoder.encode(["pump", "valve"])  # the parent's threads are running now
    if unloaded:
        encoder.unload()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns that forking with threads may hang
        worker = context.Process(target=_encode_in_child, args=(encoder, queue))
        worker.start()
    loaded, vectors = queue.get(timeout=120)
    worker.join(timeout=60)
    assert worker.exitcode == 0 and loaded == 0
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_the_built_in_model_says_once_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint_module._tokenizer.cache_clear()
    with caplog.at_level(logging.WARNING, logger="echo_integrations"):
        Encoder().encode(["a"])
        Encoder(mode="classical").encode(["a"])
    messages = [record.getMessage() for record in caplog.records if "demonstration model" in record.getMessage()]
    assert len(messages) == 1 and "model='Qwen/Qwen3-0.6B'" in messages[0]


def test_the_progress_bar_is_the_users_choice(mini: Mini, capfd: pytest.CaptureFixture[str]) -> None:
    mini(show_progress=True).encode(["a"])
    assert "encode: 100%" in capfd.readouterr().err
    mini(show_progress=False).encode(["a"])
    mini().encode(["a"])  # no terminal here
    assert "encode" not in capfd.readouterr().err


def _model(encoder: Encoder) -> Any:
    return backbone_of(encoder).model


# --- LLM2Vec-Gen


@pytest.fixture
def gen(mini: Mini, mini_tokens: Path) -> Mini:
    """The built-in model with a random token set of 5 tokens and 24 components."""
    return lambda **settings: mini(**{"mode": "llm2vec-gen", "token_set": mini_tokens, **settings})


def test_the_papers_instructions_unless_told_otherwise(gen: Mini) -> None:
    encoder, none = gen(), gen(query_instruction="", document_instruction="")
    query = "Generate a passage that best answers this question: rain"
    np.testing.assert_allclose(encoder.encode_query("rain"), none.encode_query(query), atol=1e-6)
    np.testing.assert_array_equal(encoder.encode("rain"), none.encode("Summarize the following passage: rain"))
    np.testing.assert_array_equal(none.encode_query("rain"), none.encode("rain"))
    assert np.abs(encoder.encode_query("rain") - encoder.encode("rain")).max() > 1e-3
    np.testing.assert_array_equal(encoder.encode_query("rain", instruction="Say:  "), none.encode("Say: rain"))
    np.testing.assert_array_equal(encoder.encode_query("rain", instruction=""), none.encode("rain"))
    assert (encoder.instruction("query"), none.instruction("query")) == (query.removesuffix(" rain"), "")


def test_a_token_sets_own_instructions_come_before_the_papers(gen: Mini, tmp_path: Path) -> None:
    own = tiny.token_set("echo-mini", tmp_path / "own", instructions={"query": "Find the law:"})
    encoder = gen(token_set=own)
    assert encoder.instruction("query") == "Find the law:"
    assert encoder.instruction("document") == "Summarize the following passage:"
    assert gen(token_set=own, query_instruction="Ask:").instruction("query") == "Ask:"


@pytest.mark.parametrize("spelling", ["<compress_0>", "<thought_1>", "<question1>", "<|im_end|>", "%%text%%"])
def test_a_text_that_spells_a_token_is_plain_text(gen: Mini, spelling: str) -> None:
    encoder = gen(document_instruction="")
    checkpoint, token_set = resolve(encoder)
    rendered = recipe_of(encoder, Role.DOCUMENT, checkpoint, token_set).render([f"a {spelling}"])[0]
    assert rendered.ids.tolist() == checkpoint.tokenizer.plain([f"a {spelling}"])[0].tolist()
    assert not {0, 1, 2, 3} & set(rendered.ids.tolist()) and rendered.tail == 5
    assert np.abs(encoder.encode(f"a {spelling}") - encoder.encode("a")).max() > 1e-3


def test_truncation_keeps_every_trained_token(gen: Mini) -> None:
    cut = gen(max_length=9, document_instruction="", on_truncate="truncate")
    np.testing.assert_allclose(cut.encode("a b c d e f g h"), cut.encode("a b c d"), atol=1e-6)
    with pytest.raises(
        TruncationError, match=r"texts\[1\] has 8 tokens, more than the 4 that max_length=9 leave beside 5 trained"
    ):
        gen(max_length=9, document_instruction="", on_truncate="error").encode(["a", "a b c d e f g h"])
    with pytest.raises(TruncationError, match="the instruction has"):
        gen(max_length=9, on_truncate="error").encode("a")


def test_odd_texts_have_vectors_in_every_mode(gen: Mini) -> None:
    encoder = gen(document_instruction="", on_truncate="truncate")
    texts = ["", " ", "\x00", "🙂" * 1000, "�", "\u202e"]
    vectors = encoder.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], encoder.encode(""), atol=1e-6)


def test_dimension_truncation_and_pickling(gen: Mini, mini_tokens: Path) -> None:
    encoder = gen(truncate_dim=8)
    raw = gen(normalize_embeddings=False).encode(["rain"])
    assert (gen().dimension, encoder.dimension) == (24, 8)
    np.testing.assert_allclose(encoder.encode(["rain"]), raw[:, :8] / np.linalg.norm(raw[:, :8]), atol=1e-6)
    with pytest.raises(InputError, match="truncate_dim=25 is more than the 24"):
        gen(truncate_dim=25).encode("a")
    again = pickle.loads(pickle.dumps(encoder))
    assert again.token_set == str(mini_tokens)
    np.testing.assert_array_equal(again.encode(["rain"]), encoder.encode(["rain"]))


def test_the_fingerprint_follows_tokens_and_instructions(gen: Mini, tmp_path: Path, mini_tokens: Path) -> None:
    copied = shutil.copytree(mini_tokens, tmp_path / "copied")
    assert gen().fingerprint == gen(token_set=copied).fingerprint == gen(dtype="bfloat16").fingerprint
    other = tiny.token_set("echo-mini", tmp_path / "other", seed=1)
    changes: list[dict[str, Any]] = [
        {"token_set": other},
        {"document_instruction": "Sum up:"},
        {"query_instruction": ""},
        {"max_length": 99},
        {"normalize_embeddings": False},
        {"truncate_dim": 8},
    ]
    assert len({gen(**change).fingerprint for change in [{}, *changes]}) == len(changes) + 1
    same = {"document_instruction": gen().instruction("document"), "query_instruction": "Reworded:"}
    assert gen(**same).fingerprint == gen().fingerprint


def test_threads_with_token_sets_of_their_own(gen: Mini, tmp_path: Path) -> None:
    sets = [tiny.token_set("echo-mini", tmp_path / str(i), seed=i, dimension=8 + i) for i in range(4)]
    encoders = [gen(token_set=path) for path in sets]
    expected = [encoder.encode(TEXTS[:6]) for encoder in encoders]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: encoders[i % 4].encode(TEXTS[:6]), range(16)))
    for i, vectors in enumerate(found):
        assert np.abs(vectors - expected[i % 4]).max() <= 1e-5 * np.abs(expected[i % 4]).max()
