"""Numbers for people: bytes with a binary or a decimal unit, counts with their noun."""

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


def decimal_bytes_text(n: int) -> str:
    """Bytes with a decimal unit and four places, as published sizes have it.

    >>> decimal_bytes_text(2_147_483_648), decimal_bytes_text(1500), decimal_bytes_text(999)
    ('2.1475 GB', '1.5000 kB', '999 bytes')
    """
    power = min((len(str(n)) - 1) // 3, 4)
    return f"{n / 1000**power:.4f} {('', 'kB', 'MB', 'GB', 'TB')[power]}" if power else f"{n} bytes"


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun; the plural takes an "s" unless it is given.

    >>> counted(1, "token"), counted(2048, "token"), counted(2, "pass", "passes")
    ('1 token', '2,048 tokens', '2 passes')
    """
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"
