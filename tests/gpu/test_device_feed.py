"""On a GPU: batches that were copied ahead are the same, and page-locked memory is taken once."""

from __future__ import annotations

import pytest
import torch

from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.training.device_feed import DeviceFeed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = (100_000, 2_500_000, 700_000)


def loader(count: int):
    """Batches of three sizes in page-locked memory."""
    for index in range(count):
        video = torch.full((SIZES[index % 3],), float(index)).pin_memory()
        yield Batch(0, index, BucketShape("1px", 1, 1, 1), [index], [""], [""], video_BCTHW=video)


def test_every_batch_arrives_whole() -> None:
    """The step reads each while the next one is copied; work queued before a copy must not see its memory again."""
    feed = DeviceFeed(loader(30), torch.device("cuda"))
    sums = []
    for batch in feed:
        torch.cuda._sleep(2_000_000)  # the step is slower than the copy
        sums.append(batch.video_BCTHW.double().sum())
    assert [s.item() for s in sums] == [float(i) * SIZES[i % 3] for i in range(30)]


def test_page_locked_memory_is_reused() -> None:
    """After a few batches of each size no more is taken from the system."""
    feed = DeviceFeed(loader(200), torch.device("cuda"))
    for _ in range(20):
        next(feed)
        torch.cuda.synchronize()
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    for _ in range(150):
        next(feed)
        torch.cuda.synchronize()
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before
