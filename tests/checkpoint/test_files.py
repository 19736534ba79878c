"""Files that change, vanish, lead elsewhere or are none: named, never waited for, never mapped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wse_emu.checkpoint import open_checkpoint, random_checkpoint
from wse_emu.checkpoint.files import OpenFile, read_bytes
from wse_emu.checkpoint.safetensors_file import SafetensorsFile
from wse_emu.foundation.errors import CheckpointError, ConfigError
from wse_emu.testing import contract_specs, write_checkpoint

MODEL = random_checkpoint(contract_specs()["llama-tied"], seed=3)
NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def complete(directory: Path, n_shards: int = 1) -> Path:
    write_checkpoint(MODEL, directory, n_shards=n_shards)
    for name in NAMES:
        if not (directory / name).exists():
            (directory / name).write_text("{}")
    return directory


def test_a_name_longer_than_the_system_takes_is_cut_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened: File name too long") as error:
        OpenFile(tmp_path / ("9" * 5000), ConfigError)
    assert len(str(error.value)) < 200


def test_reads_what_is_there(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # more than one piece of a hash
    (tmp_path / "f").write_bytes(content)
    file = OpenFile(tmp_path / "f", CheckpointError)
    assert file.n_bytes == len(content)
    assert file.read(300, 1000) == content[300:1300]
    seen = bytearray()

    class Digest:
        update = staticmethod(seen.extend)

    file.hash_into(Digest)
    assert bytes(seen) == content
    assert not file.closed
    file.close()
    file.close()
    assert file.closed
    assert read_bytes(tmp_path / "f", limit=len(content), error=CheckpointError) == content
    assert read_bytes(tmp_path / "absent", limit=1, error=CheckpointError) is None
    with pytest.raises(CheckpointError, match="2304000 bytes, at most 2303999 are allowed"):
        read_bytes(tmp_path / "f", limit=len(content) - 1, error=CheckpointError)


def grow(path: Path) -> None:
    with open(path, "ab") as f:
        f.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def rewrite(path: Path) -> None:
    info = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [grow, shrink, empty, rewrite])
def test_a_file_that_changes_while_it_is_open_is_refused(change: Callable[[Path], None], tmp_path: Path) -> None:
    with open_checkpoint(complete(tmp_path)) as checkpoint:
        checkpoint.tensors.read("model.norm.weight")
        change(tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read; wait until it is written"):
            checkpoint.tensors.read("model.norm.weight")


def test_a_small_file_that_changes_between_opening_and_reading_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = complete(tmp_path)
    plain = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        shrink(Path(f"/proc/self/fd/{fd}"))
        return plain(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ConfigError, match=r"config\.json: changed while it was read"):
        open_checkpoint(directory)


def test_a_file_that_was_removed_is_still_read(tmp_path: Path) -> None:
    with open_checkpoint(complete(tmp_path)) as checkpoint:
        (tmp_path / "model.safetensors").unlink()
        np.testing.assert_array_equal(checkpoint.tensors.read("model.norm.weight"), MODEL.tensors.read("model.norm.weight"))


def test_an_array_outlives_a_file_that_is_cut(tmp_path: Path) -> None:
    with open_checkpoint(complete(tmp_path)) as checkpoint:
        value = checkpoint.tensors.read("model.embed_tokens.weight")
        empty(tmp_path / "model.safetensors")
        np.testing.assert_array_equal(value, MODEL.tensors.read("model.embed_tokens.weight"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind", ["fifo", "directory", "socket", "device", "link out", "link out, relative", "link to a device", "link to nothing", "loop"]
)
def test_what_is_no_file_of_the_directory_is_refused_at_once(kind: str, name: str, tmp_path: Path) -> None:
    directory = complete(tmp_path / "model")
    file = directory / name
    outside = tmp_path / name
    file.rename(outside)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as s:
            os.chdir(directory) if len(str(file)) > 100 else None
            s.bind(os.path.relpath(file))
    elif kind == "device":
        if os.geteuid() != 0:
            pytest.skip("only root makes devices")
        try:
            os.mknod(file, 0o20600, os.makedev(1, 5))  # as /dev/zero: it never ends
        except PermissionError:
            pytest.skip("no devices in this container")
    else:
        target = {
            "link out": str(outside),
            "link out, relative": f"../{name}",
            "link to a device": "/dev/zero",
            "link to nothing": "gone",
            "loop": name,
        }[kind]
        file.symlink_to(target)
    rule = {"loop": "cannot be opened: Too many levels of symbolic links"}.get(kind, "not a regular file")
    if kind == "link to nothing":
        rule = "a link to nothing: gone; download the file again"
    elif "link" in kind:
        rule = "leads to .*, outside of the checkpoint's directory; .* put a copy there in the place of the link"
    with pytest.raises((ConfigError, CheckpointError), match=rule) as caught:
        open_checkpoint(directory)
    assert str(file) in str(caught.value)


def test_a_link_inside_the_directory_is_followed(tmp_path: Path) -> None:
    directory = complete(tmp_path)
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    (directory / "model.safetensors").symlink_to("weights.safetensors")
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.spec == MODEL.spec


def test_a_shard_that_leads_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    directory = complete(tmp_path / "model", n_shards=2)
    (directory / "model.safetensors").unlink()
    shard = directory / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: leads to .*outside"):
        open_checkpoint(directory)


def test_a_directory_may_be_reached_through_a_link(tmp_path: Path) -> None:
    complete(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    with open_checkpoint(tmp_path / "link") as checkpoint:
        assert checkpoint.name == "model"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_may_not_be_read_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = complete(tmp_path)
    (directory / name).chmod(0)
    plain = os.open

    def denied(path: str, flags: int, *rest: int) -> int:  # what a user meets; root reads everything
        if os.path.basename(path) == name:
            raise PermissionError(13, "Permission denied")
        return plain(path, flags, *rest)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises((ConfigError, CheckpointError), match=f"{name}: cannot be opened: Permission denied"):
        open_checkpoint(directory)


def test_a_disk_that_fails_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with open_checkpoint(complete(tmp_path)) as checkpoint:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: Input/output error"):
            checkpoint.tensors.read("model.norm.weight")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors as Linux shows them")
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    directory = complete(tmp_path, n_shards=3)
    (directory / "model.safetensors").unlink()

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    with open_checkpoint(directory):
        assert count() == before + 3
    assert count() == before
    shrink(directory / "model-00003-of-00003.safetensors")
    for _ in range(3):
        with pytest.raises(CheckpointError, match="download it again"):
            open_checkpoint(directory)
    open_checkpoint(complete(tmp_path / "forgotten"))  # without a warning either
    assert count() == before


def test_a_header_of_the_largest_size_allocates_nothing_that_is_not_there(tmp_path: Path) -> None:
    """A file of 16 bytes that claims 30 MB of header is refused before memory is asked for."""
    (tmp_path / "f").write_bytes((30 << 20).to_bytes(8, "little") + bytes(8))
    with pytest.raises(CheckpointError, match="truncated: header of 31457280 bytes in a file of 16"):
        SafetensorsFile(tmp_path / "f")


HUGE_INDEX = """
import json, resource, sys
from pathlib import Path
from wse_emu.checkpoint import open_checkpoint
from wse_emu.foundation.errors import CheckpointError
directory = Path(sys.argv[1])
names = {f"t{i}": f"s{i}.safetensors" for i in range(3000)}
(directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
for name in names.values():
    (directory / name).write_bytes((2).to_bytes(8, "little") + b"{}")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    open_checkpoint(directory)
except CheckpointError as e:
    print(e)
"""


def test_more_shards_than_files_may_be_open_are_named(tmp_path: Path) -> None:
    directory = complete(tmp_path)
    (directory / "model.safetensors").unlink()
    done = subprocess.run([sys.executable, "-c", HUGE_INDEX, str(directory)], capture_output=True, text=True, check=True, timeout=60)
    assert "cannot be opened: Too many open files" in done.stdout
