"""Numbers for people: bytes with a binary unit, counts with their noun."""

from __future__ import annotations


def bytes_text(n: int) -> str:
    """Bytes with a binary unit from a KiB on.

    >>> bytes_text(49152)
    '48.0 KiB'
    """
    if n < 1024:
        return f"{n} bytes"
    power = min((n.bit_length() - 1) // 10, 4)
    return f"{n / 1024**power:.1f} {('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def counted(n: int, noun: str) -> str:
    """A count with its noun.

    >>> counted(1, "token"), counted(2048, "token")
    ('1 token', '2,048 tokens')
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
