"""Text in, text out: the checkpoint's tokenizer, files of token ids, and text that grows token by token."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wse_emu.foundation.errors import CheckpointError, InputError

TOKENIZER_FILE = "tokenizer.json"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(checkpoint: Path) -> Any | None:
    """The checkpoint's ``tokenizers.Tokenizer``; None if it has no tokenizer.json.

    Raises
    ------
    CheckpointError
        If tokenizer.json cannot be read as a tokenizer.
    """
    file = checkpoint / TOKENIZER_FILE
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare Exception
        raise CheckpointError(f"{file}: not a tokenizer that `tokenizers` can read ({e})") from e


def encode(tokenizer: Any | None, text: str, checkpoint: Path) -> list[int]:
    """Token ids of `text`, special tokens as tokenizer.json's template adds them.

    Raises
    ------
    InputError
        If there is no tokenizer, or the text is no valid Unicode or gives no token.
    """
    if tokenizer is None:
        raise InputError(f"{checkpoint} has no {TOKENIZER_FILE}, so it takes token ids: use --ids FILE")
    if any("\ud800" <= c <= "\udfff" for c in text):  # bytes of the command line that were no text
        raise InputError("`--prompt` is not valid UTF-8; write the text in it, or give token ids with --ids FILE")
    ids = [int(i) for i in tokenizer.encode(text).ids]
    if not ids:
        raise InputError("`--prompt` gives no token; write at least one character")
    return ids


def read_ids(file: Path) -> list[int]:
    """Token ids in a file: a JSON list, or decimal numbers between blanks; ``-`` is stdin.

    Raises
    ------
    InputError
        If the file cannot be read or holds anything else; the first such item is named.
    """
    where = "--ids -" if str(file) == "-" else f"--ids {file}"
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{where}: cannot be read as text ({e})") from e
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except ValueError as e:
            raise InputError(f"{where}: begins with '[' but is not a JSON list ({e})") from e
    else:
        items = [int(word) if word.isascii() and word.isdigit() else word for word in text.split()]
    if not items:
        raise InputError(f"{where}: holds no token id")
    for index, item in enumerate(items):
        if type(item) is not int or item < 0:
            raise InputError(f"{where}: item {index} must be a token id, an integer >= 0, got {item!r:.40}")
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
