from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from echo_integrations.config import ModelLoadError
from echo_integrations.tokenizer import TextTokenizer
from tests.tiny import ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_text_and_template_tokens_are_the_tokenizers_own(name: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(name)
    hf = AutoTokenizer.from_pretrained(folder)
    ours = TextTokenizer.load(folder)
    for text in ("The pump was closed.", " two  spaces", "東京 café 🙂", "line\nline", ""):
        expected = hf(text, add_special_tokens=False)["input_ids"]
        assert ours.plain([text])[0].tolist() == expected
        assert ours.literal(text).tolist() == expected
    with_eos = f"The pump{hf.eos_token}"
    assert ours.literal(with_eos).tolist() == hf(with_eos, add_special_tokens=False)["input_ids"]
    assert ours.literal(with_eos)[-1] == hf.eos_token_id
    assert hf.eos_token_id not in ours.plain([with_eos])[0]
    assert ours.plain(["a", "b"])[1].tolist() == ours.plain(["b"])[0].tolist()


@pytest.mark.parametrize(("name", "bos", "eos"), [("llama", "<s>", "</s>"), ("qwen3", "", "<|im_end|>")])
def test_bos_and_eos_are_the_backbones_own_or_nothing(
    name: str, bos: str, eos: str, tiny_model: Callable[[str], Path]
) -> None:
    tokenizer = TextTokenizer.load(tiny_model(name))
    assert (tokenizer.bos, tokenizer.eos) == (bos, eos)
    assert tokenizer.literal(bos or eos).tolist() == [tokenizer.anchor_id]


def test_special_tokens_are_split_off_template_text(tiny_model: Callable[[str], Path]) -> None:
    tokenizer = TextTokenizer.load(tiny_model("llama"))
    assert tokenizer.split_special("<s>a</s>") == [("<s>", True), ("a", False), ("</s>", True)]
    assert tokenizer.split_special("plain") == [("plain", False)]
    assert tokenizer.split_special("") == []


def test_added_tokens_that_are_not_special_stay_parsed(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    hf = AutoTokenizer.from_pretrained(tiny_model("qwen3"))
    hf.add_tokens([AddedToken("<think>", special=False)])
    hf.save_pretrained(tmp_path)
    assert len(TextTokenizer.load(tmp_path).plain(["<think>"])[0]) == 1  # as the documentation says


def test_threads_do_not_disturb_each_other(tiny_model: Callable[[str], Path]) -> None:
    tokenizer = TextTokenizer.load(tiny_model("llama"))
    texts = [f"{'the pump ' * (i % 7)}</s> {i}" for i in range(200)]
    alone = [ids.tolist() for ids in tokenizer.plain(texts)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: tokenizer.plain([text])[0].tolist(), texts))
    assert together == alone


def test_a_tokenizer_written_in_python_works_too() -> None:
    """What has no Rust backend goes through its own interface, special tokens as plain characters."""

    class Python:
        bos_token, eos_token, all_special_tokens = None, "</s>", ["</s>"]
        bos_token_id, eos_token_id, pad_token_id = None, 7, None

        def __call__(
            self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False
        ) -> dict[str, list[int]]:
            ids = [7] if text == "</s>" and not split_special_tokens else [len(text)]
            return {"input_ids": [9, *ids] if add_special_tokens else ids}

    tokenizer = TextTokenizer(Python())
    assert tokenizer.plain(["abc", "</s>"])[0].tolist() == [3]
    assert tokenizer.plain(["abc", "</s>"])[1].tolist() == [4]
    assert tokenizer.literal("</s>").tolist() == [7]
    assert (tokenizer.bos, tokenizer.anchor_id) == ("", 7)
    assert tokenizer.prefix.tolist() == [9]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="has no tokenizer .tokenizer.json"):
        TextTokenizer.load(tmp_path)


def test_the_prefix_is_what_the_tokenizer_adds_by_itself(tiny_model: Callable[[str], Path]) -> None:
    assert TextTokenizer.load(tiny_model("llama")).prefix.tolist() == [0]  # <s>
    assert TextTokenizer.load(tiny_model("qwen3")).prefix.tolist() == []
    assert TextTokenizer.load(tiny_model("gpt2")).prefix.tolist() == []  # has a BOS token, adds none


def test_decoding_leaves_special_tokens_out_unless_told_otherwise(tiny_model: Callable[[str], Path]) -> None:
    tokenizer = TextTokenizer.load(tiny_model("qwen3"))
    ids = [*tokenizer.plain(["the pump"])[0].tolist(), *tokenizer.literal("<|im_end|>").tolist()]
    assert tokenizer.decode(ids) == "the pump"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the pump<|im_end|>"


def test_the_vocabulary_holds_added_tokens(tiny_model: Callable[[str], Path]) -> None:
    vocabulary = TextTokenizer.load(tiny_model("qwen3")).vocabulary()
    assert len(vocabulary) == 400 and vocabulary["<|im_end|>"] == 0
