"""Text in, text out: the checkpoint's tokenizer, files of token ids, and text that grows token by token."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import CheckpointError, InputError

TOKENIZER_FILE = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 64 << 20
_MAX_TEXT_CHARACTERS = 64 << 20
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class CheckpointTokenizer:
    """A checkpoint's tokenizer.json, which nobody vouches for: whatever goes wrong in it is a `CheckpointError` that names the file.

    Parameters
    ----------
    data : bytes
        Content of the file.
    file : Path
        What to call it in messages.
    """

    def __init__(self, data: bytes, file: Path) -> None:
        from tokenizers import Tokenizer

        self._file = file
        with self._named("not a tokenizer that `tokenizers` can read"):
            self._tokenizer = Tokenizer.from_buffer(data)
            # A prompt is neither cut nor filled up, whatever the file asks for; transformers does not either unless it is told to.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens as the file's template adds them."""
        with self._named("cannot encode the prompt"):
            return [int(i) for i in self._tokenizer.encode(text).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; ids that the file does not know are nothing."""
        with self._named("cannot decode the tokens"):
            return str(self._tokenizer.decode(list(ids)))

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except BaseException as e:
            # The library raises bare Exception, and its panics are no Exception at all.
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            reason = " ".join(str(e).split())
            raise CheckpointError(f"{self._file}: {what} ({reason[:200]}); the file is damaged, or of a newer version") from e


def load_tokenizer(checkpoint: Path) -> CheckpointTokenizer | None:
    """The checkpoint's tokenizer; None if it has no tokenizer.json.

    Raises
    ------
    CheckpointError
        If tokenizer.json cannot be read as a tokenizer, or is no regular file of the directory.
    """
    from wse_emu.checkpoint.files import read_bytes

    file = checkpoint / TOKENIZER_FILE
    data = read_bytes(file, limit=_MAX_TOKENIZER_BYTES, error=CheckpointError)
    return None if data is None else CheckpointTokenizer(data, file)


def encode(tokenizer: CheckpointTokenizer | None, text: str, checkpoint: Path, option: str = "--prompt") -> list[int]:
    """Token ids of `text`, which `option` gave, special tokens as tokenizer.json's template adds them.

    Raises
    ------
    InputError
        If there is no tokenizer, or the text is no valid Unicode or gives no token.
    CheckpointError
        If the tokenizer fails.
    """
    if tokenizer is None:
        raise InputError(f"{checkpoint} has no {TOKENIZER_FILE}, so it takes token ids: use --ids FILE")
    if any("\ud800" <= c <= "\udfff" for c in text):  # bytes of the command line that were no text
        raise InputError(f"`{option}` is not valid UTF-8; write the text in it, or give token ids with --ids FILE")
    ids = tokenizer.encode(text)
    if not ids:
        raise InputError(f"`{option}` gives no token; write at least one character")
    return ids


def read_text(file: Path, *, where: str) -> str:
    """Text of a file; ``-`` is stdin.

    Raises
    ------
    InputError
        If it cannot be read as text in UTF-8, or is longer than any text of a prompt.
    """
    try:
        if str(file) == "-":
            text = sys.stdin.read(_MAX_TEXT_CHARACTERS + 1)
        else:
            with open(file, encoding="utf-8") as f:  # perhaps a pipe
                text = f.read(_MAX_TEXT_CHARACTERS + 1)
    except (OSError, ValueError) as e:
        raise InputError(f"{where}: cannot be read as text ({e})") from e
    if len(text) > _MAX_TEXT_CHARACTERS:
        raise InputError(f"{where}: more than {_MAX_TEXT_CHARACTERS} characters; give what one prompt needs")
    return text


def read_ids(file: Path) -> list[int]:
    """Token ids in a file: a JSON list, or decimal numbers between blanks; ``-`` is stdin.

    Raises
    ------
    InputError
        If the file cannot be read or holds anything else; the first such item is named.
    """
    where = f"--ids {file}"
    text = read_text(file, where=where)
    items: list[Any]
    try:
        if text.lstrip().startswith("["):
            items = json.loads(text)
        else:
            items = [int(word) if word.isascii() and word.isdigit() else word for word in text.split()]
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not a list of token ids: neither JSON nor numbers between blanks ({e})") from e
    if not items:
        raise InputError(f"{where}: holds no token id")
    for index, item in enumerate(items):
        if type(item) is not int or item < 0:
            raise InputError(f"{where}: item {index} must be a token id, an integer >= 0, got {show(item)}")
    return list(items)


class TextStream:
    """Text of a growing sequence of tokens, in pieces that never change afterwards.

    Parameters
    ----------
    decode : callable
        Maps token ids to text.
    prompt : sequence of int
        Tokens already there; their text is not repeated.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt)
        self._written = len(decode(self._ids))

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now settled (empty while a character is incomplete)."""
        self._ids.append(token)
        text = self._decode(self._ids)
        return "" if text.endswith(_UNFINISHED) else self._take(text)

    def finish(self) -> str:
        """Return what is left, incomplete characters included."""
        return self._take(self._decode(self._ids))

    def _take(self, text: str) -> str:
        piece, self._written = text[self._written :], max(self._written, len(text))
        return piece
