"""Text in, text out: files of ids, the tokenizer, and pieces of text that never change."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_emu.cli import tokens as tokens_module
from wse_emu.cli.options import shipped_model
from wse_emu.cli.tokens import TextStream, encode, load_tokenizer, read_ids
from wse_emu.foundation.errors import CheckpointError, InputError


def utf8(ids: list[int]) -> str:
    """A tokenizer of bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=12), st.text(max_size=12))
def test_pieces_join_to_the_whole_text(prompt: str, text: str) -> None:
    stream = TextStream(utf8, list(prompt.encode()))
    pieces = [stream.push(b) for b in text.encode()]
    assert "".join(pieces) + stream.finish() == text


def test_a_character_waits_until_it_is_whole() -> None:
    stream = TextStream(utf8, [])
    assert [stream.push(b) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]


def test_an_incomplete_end_is_written_as_such() -> None:
    stream = TextStream(utf8, [])
    assert stream.push(0xE2) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("text", ["[1, 2, 30]", "1 2\n30\n", " [1,2,30]\n", "1\t2   30"])
def test_ids_from_a_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "ids"
    file.write_text(text)
    assert read_ids(file) == [1, 2, 30]


def test_ids_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("5 6"))
    assert read_ids(Path("-")) == [5, 6]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "holds no token id"),
        ("[]", "holds no token id"),
        ("1 two 3", "item 1 must be a token id, an integer >= 0, got 'two'"),
        ("[1, -2]", "item 1 must be a token id, an integer >= 0, got -2"),
        ("[1, true]", "item 1 must be a token id, an integer >= 0, got True"),
        ("[1, 2.0]", "item 1 must be a token id, an integer >= 0, got 2.0"),
        ("[1, 2", "not a list of token ids: neither JSON nor numbers between blanks (Expecting"),
        ("1 ²", "item 1 must be a token id"),
    ],
)
def test_anything_else_is_refused_by_name(text: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_ids(file)
    assert f"--ids {file}: {what}" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--ids .*nothing: cannot be read as text"):
        read_ids(tmp_path / "nothing")


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bin"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as text"):
        read_ids(file)


def test_text_without_a_tokenizer_says_the_way_out(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(InputError, match=r"has no tokenizer\.json, so it takes token ids: use --ids FILE"):
        encode(None, "hello", tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer that `tokenizers` can read"):
        load_tokenizer(tmp_path)


def with_changes(tmp_path: Path, **changes: object) -> Path:
    """Directory with the shipped tokenizer, changed."""
    content = json.loads((shipped_model() / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    return tmp_path


def test_a_tokenizer_neither_cuts_nor_fills_up_a_prompt(tmp_path: Path) -> None:
    padding = {
        "strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    text = "Return the length of a list."
    expected = encode(load_tokenizer(shipped_model()), text, shipped_model())
    assert encode(load_tokenizer(with_changes(tmp_path, padding=padding, truncation=truncation)), text, tmp_path) == expected


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
NO_UNK = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "z"}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"normalizer": CHARSMAP}, "not a tokenizer that `tokenizers` can read"),  # the library panics
        ({"normalizer": {"type": "x"}}, "not a tokenizer that `tokenizers` can read"),
        ({"model": NO_UNK}, "cannot encode the prompt"),
    ],
)
def test_a_tokenizer_that_fails_is_named(changes: dict[str, object], what: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: ({what}) \(.*\); the file is damaged, or of a newer version"):
        encode(load_tokenizer(with_changes(tmp_path, **changes)), "hello", tmp_path)


def test_a_tokenizer_that_cannot_decode_is_named(tmp_path: Path) -> None:
    decoder = {"type": "Strip", "content": "e", "start": 0, "stop": 3}  # of "e" three times: the library panics
    tokenizer = load_tokenizer(with_changes(tmp_path, decoder=decoder))
    assert tokenizer is not None
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot decode the tokens \("):
        tokenizer.decode(tokenizer.encode("e"))


def test_an_interrupt_in_a_tokenizer_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(shipped_model())
    assert tokenizer is not None

    class Interrupted:
        def encode(self, text: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_tokenizer", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def test_a_fifo_in_the_place_of_the_tokenizer_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a regular file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, f"[{'9' * 5000}]", "{" * 100_000])
def test_ids_that_no_reader_should_follow(text: str, tmp_path: Path) -> None:
    file = tmp_path / "ids"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_ids(file)
    assert len(str(caught.value)) < 500


def test_ids_without_an_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_MAX_TEXT_CHARACTERS", 1000)
    with pytest.raises(InputError, match="--ids /dev/zero: more than 1000 characters"):
        read_ids(Path("/dev/zero"))


def test_a_prompt_of_bytes_that_are_no_text_is_refused() -> None:
    path = shipped_model()
    with pytest.raises(InputError, match="`--prompt` is not valid UTF-8"):
        encode(load_tokenizer(path), b"a\xff".decode(errors="surrogateescape"), path)


def test_empty_prompt_is_refused() -> None:
    path = shipped_model()
    with pytest.raises(InputError, match="`--prompt` gives no token"):
        encode(load_tokenizer(path), "", path)


def test_the_shipped_tokenizer_reads_back_what_it_wrote() -> None:
    path = shipped_model()
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    assert tokenizer.decode(encode(tokenizer, "Return the length of a list.", path)) == "Return the length of a list."
