"""Joining the others: which device a process takes, and what it is told where there is none."""

from __future__ import annotations

import pytest
import torch

from opensora_like import runtime as rt


@pytest.mark.parametrize(("seen", "said"), [(1, "1 or fewer; .*set LOCAL_RANK=0 for all$"), (2, "2 or fewer$")])
def test_a_process_without_a_gpu_is_told_what_to_set(monkeypatch, seen, said):
    """Too many processes; where one alone is seen, it may be this process' own under another process' number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(RuntimeError, match=f"process 3 of this machine has no GPU: it sees {seen}; .*{said}"):
        rt.start()
