"""Headers that lie: nothing outside the file is read, nothing large is allocated."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load

from wse_emu.checkpoint.safetensors_file import SafetensorsFile
from wse_emu.foundation.errors import CheckpointError


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def encode(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


def test_reads_what_the_format_describes(write: Any) -> None:
    values = np.arange(6, dtype=np.float32)
    file = SafetensorsFile(write(encode({"__metadata__": {"format": "pt"}, "a": entry()}, values.tobytes())))
    np.testing.assert_array_equal(file.read_rows("a", 0, 2), values.reshape(2, 3))
    np.testing.assert_array_equal(file.read_rows("a", 1, 2), values.reshape(2, 3)[1:])
    assert file.read_rows("a", 1, 1).shape == (0, 3)


@pytest.mark.parametrize("pad", range(4))
def test_unaligned_data_comes_back_aligned(write: Any, pad: int) -> None:
    values = np.arange(6, dtype=np.float32)
    header = json.dumps({"a": entry()}).encode() + b" " * pad
    value = SafetensorsFile(write(encode(header, values.tobytes()))).read_rows("a", 0, 2)
    assert value.flags.aligned
    assert not value.flags.writeable
    np.testing.assert_array_equal(value, values.reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too short"),
        (b"1234567", "7 bytes, too short"),
        (encode({}, b"", length=1 << 62), "header of 4611686018427387904 bytes, at most"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n", "a Git LFS pointer .* `git lfs pull`"),
        (encode({"a": entry(offsets=[0, 131072])}, bytes(24)), "inside the file of 101 bytes, got .*: download it again"),
        (encode({}, b"", length=1000), "truncated: header of 1000 bytes in a file of 10"),
        (encode(b"{", b""), "not valid JSON"),
        (encode(b"[]", b""), "must hold a JSON object"),
        (encode(b'{"a": 1, "a": 1}', b""), "key 'a' stands there twice"),
        (encode({"a": 3}, b""), "'a': must have exactly dtype, shape and data_offsets"),
        (encode({"a": {"dtype": "F32"}}, b""), "'a': must have exactly"),
        (encode({"a": entry(dtype="F33")}, bytes(24)), "'a': unknown dtype 'F33'"),
        (encode({"a": entry(dtype=3)}, bytes(24)), "'a': unknown dtype '3'"),
        (encode({"a": entry(shape="2,3")}, bytes(24)), "'a': shape must be"),
        (encode({"a": entry(shape=[2, -3])}, bytes(24)), "'a': shape must be"),
        (encode({"a": entry(shape=[True, 6])}, bytes(24)), "'a': shape must be"),
        (encode({"a": entry(shape=[2.0, 3])}, bytes(24)), "'a': shape must be"),
        (encode({"a": entry(shape=[1] * 9)}, bytes(24)), "'a': shape must be at most 8 sizes"),
        (encode({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(24)), "'a': shape must be"),
        (encode({"a": entry(shape=[100, 100, 100])}, bytes(24)), "shape .* of F32 needs 4e.06 bytes, data_offsets give 24"),
        (encode({"a": entry(offsets=[0])}, bytes(24)), "'a': data_offsets must be two"),
        (encode({"a": entry(offsets=[-24, 0])}, bytes(24)), "'a': data_offsets must be two"),
        (encode({"a": entry(offsets=[0, 1 << 70])}, bytes(24)), "'a': data_offsets must be two"),
        (encode({"a": entry(offsets=[24, 0])}, bytes(24)), "'a': bytes 24:0 do not lie"),
        (encode({"a": entry(offsets=[1, 25])}, bytes(24)), "'a': bytes 1:25 do not lie in the file's 24 bytes"),
        (encode({"a": entry()}, bytes(23)), "'a': bytes 0:24 do not lie in the file's 23 bytes"),
        (encode({"a": entry(), "b": entry(offsets=[20, 44])}, bytes(44)), "'b' overlaps 'a'"),
        (encode({"a": entry(), "b": entry()}, bytes(24)), "'b' overlaps 'a'|'a' overlaps 'b'"),
        (encode({"a": entry(), "b": entry(offsets=[28, 52])}, bytes(52)), "4 bytes before 'b' belong to no tensor"),
        (encode({"a": entry()}, bytes(30)), "tensors end at byte .*, the file at"),
    ],
)
def test_lying_header_is_refused_by_name(write: Any, content: bytes, message: str) -> None:
    path = write(content)
    with pytest.raises(CheckpointError, match=message) as e:
        SafetensorsFile(path)
    assert str(path) in str(e.value)
    assert len(str(e.value)) < 600


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: there is no such file"):
        SafetensorsFile(tmp_path / "absent.safetensors")


GOOD = encode({"a": entry(), "b": entry("BF16", [4], [24, 32]), "c": entry("F16", [0, 5], [32, 32])}, bytes(range(32)))


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_any_damage_to_the_header_is_named_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(GOOD) - 33))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(GOOD)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.mktemp("damaged") / "f.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name, item in file.entries.items():
        if item.dtype in ("F32", "F16", "BF16") and item.shape:
            assert file.read_rows(name, 0, item.shape[0]).shape == item.shape


@given(
    st.lists(st.tuples(st.sampled_from(["<f4", "<f2"]), st.lists(st.integers(0, 5), min_size=1, max_size=3)), max_size=4), st.integers(0, 7)
)
@settings(deadline=None, max_examples=60)
def test_agrees_with_the_formats_own_library(tmp_path_factory: pytest.TempPathFactory, tensors: list[Any], cut: int) -> None:
    header: dict[str, Any] = {}
    data = b""
    rng = np.random.default_rng(0)
    for i, (dtype, shape) in enumerate(tensors):
        raw = rng.standard_normal(shape).astype(dtype).tobytes()
        header[f"t{i}"] = entry({"<f4": "F32", "<f2": "F16"}[dtype], shape, [len(data), len(data) + len(raw)])
        data += raw
    content = encode(header, data)
    content = content[: len(content) - cut]
    path = tmp_path_factory.mktemp("agree") / "f.safetensors"
    path.write_bytes(content)
    try:
        expected = load(content)
    except SafetensorError:
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
        return
    file = SafetensorsFile(path)
    assert file.entries.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(file.read_rows(name, 0, value.shape[0]), value.astype(np.float32))
