"""Disks that fail: the path and the errno are said, training ends or goes on as asked, nothing incomplete shows."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import damage
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from tests.checkpoint.one_process import make_manager


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    if os.geteuid() != 0:
        pytest.skip("needs the right to mount: not root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk))
    yield disk
    subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)


def end_of_save(manager: CheckpointManager) -> None:
    """What the loop does once per step, until the save in flight has ended."""
    while manager._pending is not None:
        manager.check()
        time.sleep(0.001)


@pytest.mark.parametrize("async_io", [False, True])
def test_a_full_disk_stops_the_run_with_path_and_errno(small_disk: Path, async_io: bool) -> None:
    """The save before stays, the space that the failed one took is free again, and the next one succeeds."""
    manager = make_manager(small_disk / "run", async_io=async_io)
    manager.save(TrainState(step=1))
    manager.wait()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 8192))
    with pytest.raises(OSError, match=rf"Errno {errno.ENOSPC}.*\.writing-epoch0-global_step2.*complete checkpoint is"):
        manager.save(TrainState(step=2))
        end_of_save(manager)
    saved = layout.complete_checkpoints(small_disk / "run")
    assert [layout.step_of(f) for f in saved] == [1] and not damage(saved[0], 0, 1)
    assert not list((small_disk / "run").glob(".*"))
    filler.unlink()
    manager.save(TrainState(step=3))
    manager.wait()
    assert manager.newest_intact(manager.load).step == 3


def test_on_save_error_continue_logs_and_goes_on(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same failure, reported at the next step as an error in the log."""
    manager = make_manager(small_disk / "run", async_io=True, on_save_error="continue")
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 8192))
    with caplog.at_level("ERROR", "opensora_like"):
        manager.save(TrainState(step=1))
        end_of_save(manager)
    assert f"Errno {errno.ENOSPC}" in caplog.text and "training goes on" in caplog.text
    assert layout.complete_checkpoints(small_disk / "run") == []


def test_a_read_only_disk(small_disk: Path) -> None:
    """A disk that turns read-only, as one with errors does."""
    manager = make_manager(small_disk / "run")
    manager.save(TrainState(step=1))
    mount("-o", "remount,ro", str(small_disk))
    with pytest.raises(OSError, match=rf"Errno {errno.EROFS}.*epoch0-global_step2"):
        manager.save(TrainState(step=2))
    assert manager.newest_intact(manager.load).step == 1


def test_a_lost_mount_is_not_replaced_by_the_disk_below(small_disk: Path) -> None:
    """When the run's folder is gone the save fails; it does not fill the disk that the mount had covered."""
    manager = make_manager(small_disk / "run", async_io=True)
    subprocess.run(["umount", "-l", str(small_disk)], check=True)
    with pytest.raises(OSError, match=rf"Errno {errno.ENOENT}.*epoch0-global_step1"):
        manager.save(TrainState(step=1))
        end_of_save(manager)
    assert list(small_disk.iterdir()) == []


def test_a_flipped_bit_in_any_file_is_found(tmp_path: Path) -> None:
    """Every file of a checkpoint but the list of checksums is in that list; a damaged list is an error as well."""
    manager = make_manager(tmp_path)
    folder = manager.save(TrainState(step=1))
    for file in folder.iterdir():
        content = file.read_bytes()
        if content:
            file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            with pytest.raises(OSError, match=file.name.replace(".", r"\.")):
                make_manager(tmp_path).load(folder)
            file.write_bytes(content)
    assert manager.load(folder).step == 1


def test_an_index_that_a_full_disk_cannot_take_is_an_error(small_disk: Path) -> None:
    """Its files are mapped, so that the process would end by a signal where a page finds no room."""
    program = (
        "from opensora_like.datasets.index import make_folder_once, new_array\n"
        f"from pathlib import Path\nfolder = Path({str(small_disk)!r})\n"
        "make_folder_once(folder / 'index', lambda made: new_array(made / 'a.npy', int, 2**20).fill(1))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "No space left on device for 8388608 bytes" in done.stderr
    assert [file.name for file in small_disk.iterdir()] == [".lock"]
