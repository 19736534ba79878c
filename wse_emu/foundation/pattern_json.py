"""Attention patterns as JSON has them: an object with the fields of a pattern, or a list with one for each layer."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.arguments import show
from wse_emu.foundation.attention_pattern import MAX_KEYS, AttentionPattern
from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.key_ranges import within
from wse_emu.foundation.listed_keys import ListedKeys
from wse_emu.foundation.mask_array import MaskArray

_HERE = "attention pattern"
_LISTED = ("indices", "topk_length")
_NAMES = (*(f.name for f in fields(AttentionPattern)), *_LISTED)


def pattern_to_json(pattern: AttentionPattern) -> dict[str, Any]:
    """The fields that a pattern has beyond the defaults, as JSON-able values; a pattern of all keys has none.

    A mask stands there as rows of 0 and 1, listed keys as `indices`.

    Raises
    ------
    SpecError
        If the mask is a function, which JSON cannot hold.
    """
    out: dict[str, Any] = {}
    for f in fields(pattern):
        value = getattr(pattern, f.name)
        if f.name == "mask":
            if isinstance(value, MaskArray):
                out["mask"] = value.values.astype(np.int64).tolist()
            elif isinstance(value, ListedKeys):
                out["indices"] = _listed(value)
            elif value is not None:
                raise SpecError(f"{_HERE}: `mask` is a function, which has no form in JSON; give an array of booleans")
        elif value != f.default:
            out[f.name] = _nested(value) if f.name in ("heads", "blocks") else value
    return out


def pattern_from_json(value: Any, *, where: str = _HERE) -> AttentionPattern:
    """A pattern from an object with its fields; what is left out, or null, has its default.

    Parameters
    ----------
    value : dict
        Names and values of `AttentionPattern`: `blocks` as lists of integers, `mask` as rows of true and false or 1 and 0, `heads` as a
        list of such objects. Or `indices` and, if need be, `topk_length`, as `AttentionPattern.listed` takes them.
    where : str
        What to call it in messages.

    Raises
    ------
    SpecError
        If it is no object, a key is no field, or the fields break a rule of `AttentionPattern`; the message begins with `where`.
    """
    if not isinstance(value, dict):
        raise SpecError(f"{where}: must be an object with fields of a pattern ({', '.join(_NAMES)}), got {show(value)}")
    given: dict[str, Any] = {}
    for key, item in value.items():
        if key not in _NAMES:
            raise SpecError(f"{where}: there is no field {show(key)}; there are {', '.join(_NAMES)}")
        if item is not None:
            given[key] = item
    if "blocks" in given:
        given["blocks"] = tuple(tuple(row) for row in _lists(given["blocks"], f"{where}: `blocks`"))
    if "mask" in given:
        given["mask"] = _mask(given["mask"], where)
    if "heads" in given:
        if not isinstance(given["heads"], list):
            raise SpecError(f"{where}: `heads` must be a list with a pattern for every query head, got {show(given['heads'])}")
        for i, one in enumerate(given["heads"]):
            if isinstance(one, dict) and one.get("heads") is not None:
                raise SpecError(f"{where}: heads[{i}]: must be a pattern without `heads`, got {show(one)}")
        given["heads"] = tuple(pattern_from_json(one, where=f"{where}: heads[{i}]") for i, one in enumerate(given["heads"]))
    lists = _of_lists(given, where) if any(name in given for name in _LISTED) else None
    try:
        return AttentionPattern(**given) if lists is None else AttentionPattern.listed(*lists)
    except SpecError as error:
        raise SpecError(f"{where}: {str(error).removeprefix(f'{_HERE}: ')}") from error


def patterns_from_json(value: Any, *, where: str = _HERE) -> AttentionPattern | list[AttentionPattern | None]:
    """One pattern from an object, or one for each layer from a list, None where it has null.

    Raises
    ------
    SpecError
        As `pattern_from_json`; the message names the layer.
    """
    if not isinstance(value, list):
        return pattern_from_json(value, where=where)
    return [None if one is None else pattern_from_json(one, where=f"{where}: layer {i}") for i, one in enumerate(value)]


def pattern_text(pattern: AttentionPattern) -> str:
    """A pattern in one line for people.

    >>> pattern_text(AttentionPattern(window=16, sinks=4)), pattern_text(AttentionPattern())
    ('window 16, sinks 4', 'all keys')
    """
    parts = []
    for f in fields(pattern):
        value = getattr(pattern, f.name)
        if value == f.default:
            continue
        if f.name == "heads":
            value = f"in {len(pattern.layouts)} ways"
        elif f.name == "blocks":
            value = f"{len(value)}"
        elif f.name == "mask":
            value = repr(value) if isinstance(value, (MaskArray, ListedKeys)) else getattr(value, "__name__", "a function")
        parts.append(f"{f.name.replace('_', ' ')} {value}")
    return ", ".join(parts) or "all keys"


def _of_lists(given: dict[str, Any], where: str) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    others = [name for name in given if name not in _LISTED]
    if others or "indices" not in given:
        raise SpecError(f"{where}: `indices` stands alone or with `topk_length`, got {', '.join(f'`{name}`' for name in given)}")
    rows, lengths = _lists(given["indices"], f"{where}: `indices`"), given.get("topk_length")
    if any(len(row) != len(rows[0]) for row in rows):
        raise SpecError(f"{where}: `indices` must have rows of one length; fill shorter ones with -1")
    if not isinstance(lengths, list | None):
        raise SpecError(f"{where}: `topk_length` must be a list with a number for every query, got {show(lengths)}")
    for name, value in (("indices", [i for row in rows for i in row]), ("topk_length", lengths or [])):
        if any(type(i) is not int or not -1 <= i <= MAX_KEYS for i in value):
            raise SpecError(f"{where}: `{name}` must hold integers in -1..{MAX_KEYS}, got {show(given[name])}")
    listed = np.array(rows, np.int64).reshape(len(rows), -1 if rows else 0)
    return listed, None if lengths is None else np.array(lengths, np.int64)


def _listed(keys: ListedKeys) -> list[list[int]]:
    query, key = np.divmod(keys.keys, keys.n_queries)
    counts = np.bincount(query, minlength=keys.n_queries)
    rows = np.full((keys.n_queries, max(1, int(counts.max()))), -1, np.int64)
    rows[query, within(counts)] = key
    out: list[list[int]] = rows.tolist()
    return out


def _nested(value: tuple[Any, ...]) -> list[Any]:
    return [pattern_to_json(one) if isinstance(one, AttentionPattern) else list(one) for one in value]


def _lists(value: Any, where: str) -> list[list[Any]]:
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise SpecError(f"{where} must be a list of lists, got {show(value)}")
    return value


def _mask(value: Any, where: str) -> NDArray[np.bool_]:
    rows = _lists(value, f"{where}: `mask`")
    for q, row in enumerate(rows):
        if len(row) != len(rows):
            raise SpecError(f"{where}: `mask` must have as many keys as queries, {len(rows)}; row {q} has {len(row)}")
        for k, item in enumerate(row):
            if item is not True and item is not False and not (type(item) is int and item in (0, 1)):
                raise SpecError(f"{where}: `mask` must hold true and false, or 1 and 0; [{q}][{k}] is {show(item)}")
    return np.array(rows, np.bool_).reshape(len(rows), len(rows))
