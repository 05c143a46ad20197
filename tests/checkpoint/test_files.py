"""A file has every byte, whether or not it was written past the page cache, and gives back any range of them."""

import errno
import os

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from opensora_like.checkpoint import files
from opensora_like.checkpoint.files import ALIGNMENT, CHUNK, TensorFile, file_checksum, write_parts, write_safetensors

SIZES = [0, 1, ALIGNMENT, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + ALIGNMENT, 3 * CHUNK + 5]


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path, tmp_path_factory):
    """A folder on a disk, and one on a tmpfs where there is one."""
    if request.param == "disk":
        return tmp_path
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    import tempfile

    made = tempfile.TemporaryDirectory(dir="/dev/shm")
    request.addfinalizer(made.cleanup)
    return type(tmp_path)(made.name)


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_arrives(folder, size):
    """Whole and odd numbers of blocks, out of parts that end anywhere; the checksum is that of the file."""
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)).numpy()
    cut = size // 3
    written = write_parts(folder / "file", [memoryview(data[:cut]), memoryview(data[cut:])])
    assert (folder / "file").read_bytes() == data.tobytes()
    assert written == (size, xxhash.xxh3_64(data.tobytes()).hexdigest())
    assert file_checksum(folder / "file") == written.xxh3_64


def test_a_file_system_without_direct_writes_is_written_to_as_usual(tmp_path, monkeypatch):
    """Some take the flag and refuse the first write with EINVAL; then the flag goes and no byte is missing."""
    real, refused = os.pwrite, []

    def pwrite(handle, data, offset):
        if files.fcntl.fcntl(handle, files.fcntl.F_GETFL) & files.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no direct writes here")
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = os.urandom(2 * CHUNK + 7)
    write_parts(tmp_path / "file", [memoryview(data)])
    assert refused == [0]
    assert (tmp_path / "file").read_bytes() == data


def test_short_writes_go_on_where_they_stopped(tmp_path, monkeypatch):
    """A call may write less than it was given, at no whole block."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: real(handle, data[: min(len(data), 3 * ALIGNMENT)], at))
    data = os.urandom(CHUNK + 12345)
    write_parts(tmp_path / "file", [memoryview(data)])
    assert (tmp_path / "file").read_bytes() == data


def test_ranges_are_read_in_place(tmp_path):
    """Other libraries read the file, and a range lands in its tensor."""
    tensors = {"a": torch.randn(1000), "b": torch.randn(300_000).bfloat16(), "c": torch.tensor([7])}
    write_safetensors(tmp_path / "file", list(tensors.items()))
    for name, tensor in load_file(tmp_path / "file").items():
        assert torch.equal(tensor, tensors[name])
    reader = TensorFile(tmp_path / "file")
    out = torch.empty(100, dtype=torch.bfloat16)
    reader.read_into(out, "b", 299_900)
    assert torch.equal(out, tensors["b"][299_900:])
    with pytest.raises(ValueError, match=r"'b' has no 100 torch\.bfloat16 from 299901"):
        reader.read_into(out, "b", 299_901)


def test_a_file_that_was_cut_is_named(tmp_path):
    """While reading, after the checksums were compared: the disk may fail at any time."""
    write_safetensors(tmp_path / "file", [("a", torch.randn(1000))])
    reader = TensorFile(tmp_path / "file")
    os.truncate(tmp_path / "file", 2000)
    with pytest.raises(OSError, match=r"ends at byte 2000, .* were to come"):
        reader.read_into(torch.empty(1000), "a", 0)
    os.truncate(tmp_path / "file", 20)
    with pytest.raises(OSError, match="cannot be read"):
        TensorFile(tmp_path / "file")
