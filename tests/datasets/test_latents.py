"""What a store holds is a dataset: rows in the order of keys, buckets by size and frames, windows by counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora_like.datasets.latent_store import StoreWriter, finish
from opensora_like.datasets.latents import Latents
from opensora_like.datasets.loader import make_loader

FACTS = {"latent_channels": 2, "temporal_stride": 4, "spatial_stride": 8, "is_causal": True, "has_deviation": True}
BUCKETS = {"16x24,24x16": {9: (1.0, 2), 17: (1.0, 2), 1: (1.0, 1)}, "32x32": {9: (1.0, 2)}}
# key -> frames, height, width; in another order than that of the keys
ENTRIES = {
    **{f"wide{n}": (25, 16, 24) for n in range(4)},
    **{f"short{n}": (13, 16, 24) for n in range(4)},
    **{f"square{n}": (9, 32, 32) for n in range(3)},
    **{f"tall{n}": (9, 24, 16) for n in range(2)},
    "image": (1, 16, 24),
}


def make_store(folder: Path, entries: dict[str, tuple[int, int, int]] = ENTRIES) -> Path:
    """Latent frame t of every entry is t everywhere."""
    with StoreWriter(folder, fingerprint={"latents": FACTS}) as writer:
        for key, (num_frames, height, width) in entries.items():
            count = (num_frames - 1) // 4 + 1
            latents = torch.arange(float(count)).view(1, -1, 1, 1).expand(2, -1, height // 8, width // 8)
            facts = {"text": f"text of {key}", "num_frames": num_frames, "height": height, "width": width, "fps": 8.0}
            tensors = {"latents": latents, "latents_std": latents + 0.5, "embeddings.text": torch.full((3, 4), 2.0)}
            writer.add(key, tensors, {"path": f"{key}.mp4", **facts})
    finish(folder)
    return folder


def open_latents(folder: Path, **options: object) -> Latents:
    return Latents(str(folder), **{"bucket_config": BUCKETS, "multiple": 8, "seed": 3, **options})


def test_buckets_take_entries_by_size_and_frames(tmp_path: Path) -> None:
    """Every sample has the latents of its bucket's shape, the text of its entry, and both tensors cut alike."""
    dataset = open_latents(make_store(tmp_path))
    assert len(dataset) == len(ENTRIES) and dataset.table.row(0)["key"] == "image"
    plan = dataset.plan(0)
    seen: dict[tuple[int, int, int], list[str]] = {}
    for batch in make_loader(dataset, [plan[number] for number in range(len(plan))]):
        frames = (batch.shape.num_frames - 1) // 4 + 1
        assert batch.latents_BCTHW.shape == (len(batch), 2, frames, batch.shape.height // 8, batch.shape.width // 8)
        torch.testing.assert_close(batch.latents_std_BCTHW, batch.latents_BCTHW + 0.5)
        assert batch.embeddings["text"].shape == (len(batch), 3, 4) and batch.video_BCTHW is None
        seen.setdefault(tuple(batch.shape[1:]), []).extend(batch.paths)
        assert batch.text == [f"text of {path.removesuffix('.mp4')}" for path in batch.paths]
    assert sorted(seen[17, 16, 24]) == [f"wide{n}.mp4" for n in range(4)]
    assert sorted(seen[9, 16, 24]) == [f"short{n}.mp4" for n in range(4)]
    assert sorted(seen[9, 24, 16]) == ["tall0.mp4", "tall1.mp4"]
    assert seen[1, 16, 24] == ["image.mp4"] and len(seen[9, 32, 32]) == 2


def test_windows_are_a_function_of_epoch_and_row(tmp_path: Path) -> None:
    """Consecutive latent frames, every beginning in some epoch, the same with workers; "first" begins at 0."""
    folder = make_store(tmp_path)
    dataset = open_latents(folder)
    shape = next(s for s in dataset.buckets.shapes if tuple(s[1:]) == (17, 16, 24))
    row = dataset.table.num_rows - 1  # the last key is wide3
    drawn = [dataset.read(row, shape, epoch).latents_CTHW[0, :, 0, 0].tolist() for epoch in range(30)]
    assert all(window == [window[0] + t for t in range(5)] for window in drawn)
    assert {window[0] for window in drawn} == {0.0, 1.0, 2.0}
    again = open_latents(folder)
    assert [again.read(row, shape, epoch).latents_CTHW[0, :, 0, 0].tolist() for epoch in range(30)] == drawn
    assert len({open_latents(folder, seed=9).read(row, shape, e).latents_CTHW[0, 0, 0, 0].item() for e in range(9)}) > 1
    first = open_latents(folder, windows="first")
    assert all(first.read(row, shape, epoch).latents_CTHW[0, 0, 0, 0] == 0 for epoch in range(9))
    plan = dataset.plan(1)
    micro_batches = [plan[number] for number in range(len(plan))]
    here, there = make_loader(dataset, micro_batches), make_loader(dataset, micro_batches, num_workers=2)
    assert all(torch.equal(a.latents_BCTHW, b.latents_BCTHW) for a, b in zip(here, there, strict=True))


def test_rows_can_be_quarantined(tmp_path: Path) -> None:
    """By row and path of the store's table."""
    listed = tmp_path / "bad.csv"
    listed.write_text("row,path\n0,image.mp4\n")
    dataset = open_latents(make_store(tmp_path / "store"), quarantine=str(listed))
    plan = dataset.plan(0)
    assert all(0 not in plan[number].rows for number in range(len(plan)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bucket_config": {"24x24": {9: (1.0, 1)}}}, "3 of 3 entries.*of another size, the first 32x32.*'32x32'"),
        ({"bucket_config": {"16x24": {9: (1.0, 1)}}}, "resolution, '16x24,24x16,32x32'"),
        ({"memory_efficient": True}, "memory_efficient is about dataset.data_path"),
        ({"data_path": "table.csv"}, "was not made from a table; remove it"),
        ({"data_path": "table.csv", "windows": "first"}, "windows='first' is for a store without"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, options: dict, text: str) -> None:
    """A size that is not there, and settings that would have no effect."""
    with pytest.raises(ValueError, match=text):
        open_latents(make_store(tmp_path), **options)
