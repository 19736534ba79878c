"""Text in, text out: files of ids, the tokenizer, and pieces of text that never change."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        ("[1, 2", "begins with '[' but is not a JSON list"),
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
