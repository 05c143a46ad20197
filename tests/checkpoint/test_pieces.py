"""The tensor format: what any number of ranks wrote, any range of it can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_like.checkpoint.pieces import Piece, PieceReader, write_pieces
from opensora_like.checkpoint.weights import load_weights, read_weights


def write_in_parts(folder: Path, tensors: dict[str, torch.Tensor], cuts: list[float]) -> None:
    """Write each tensor cut at these fractions, one rank per part."""
    for rank, (low, high) in enumerate(zip([0.0, *cuts], [*cuts, 1.0], strict=True)):
        pieces = []
        for name, tensor in tensors.items():
            start, stop = int(low * tensor.numel()), int(high * tensor.numel())
            if stop > start:
                pieces.append(Piece("master", name, tuple(tensor.shape), start, stop, tensor.flatten()[start:stop]))
        pieces.append(Piece("step", "a", (), 0, 1, torch.tensor(7.0)))
        write_pieces(folder, rank, pieces)


def test_any_range_reads_back_whatever_the_cuts(tmp_path: Path) -> None:
    """Ranges of tensors written by 1 to 5 ranks, at random places, equal the tensor's own."""
    random = np.random.default_rng(0)
    tensors = {"a": torch.randn(7, 5, 3), "b.c": torch.randn(11), "d": torch.randn(1)}
    for trial, ranks in enumerate([1, 2, 3, 5, 5]):
        folder = tmp_path / str(trial)
        folder.mkdir()
        write_in_parts(folder, tensors, sorted(random.random(ranks - 1).tolist()))
        reader = PieceReader(folder)
        assert sorted(reader.names("master")) == sorted(tensors)
        assert reader.read("step", "a").item() == 7.0
        for name, tensor in tensors.items():
            assert torch.equal(reader.read_whole("master", name), tensor)
            for _ in range(20):
                start, stop = sorted(random.integers(0, tensor.numel() + 1, 2).tolist())
                assert torch.equal(reader.read("master", name, start, stop), tensor.flatten()[start:stop])


def test_missing_parts_are_errors(tmp_path: Path) -> None:
    """A gap, a cut file and a missing tensor are named, never filled."""
    write_pieces(tmp_path, 0, [Piece("master", "a", (10,), 0, 4, torch.ones(4))])
    write_pieces(tmp_path, 1, [Piece("master", "a", (10,), 6, 10, torch.ones(4))])
    reader = PieceReader(tmp_path)
    with pytest.raises(OSError, match="no elements 4 to 10 of 10"):
        reader.read("master", "a")
    with pytest.raises(KeyError, match="no ema of 'a'"):
        reader.read("ema", "a")
    file = tmp_path / "master.rank00001.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(OSError, match="rank00001"):
        PieceReader(tmp_path).read("master", "a", 6, 8)
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        PieceReader(tmp_path / "nowhere")


def test_weights_report_every_key(tmp_path: Path) -> None:
    """Strict loading refuses any difference and names it; not strict loads what fits, but not nothing."""
    from safetensors.torch import save_file

    model = torch.nn.Linear(3, 2)
    save_file({"weight": torch.ones(2, 3), "extra": torch.ones(1)}, tmp_path / "w.safetensors")
    weights = read_weights(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \['bias'\], 1 unexpected \['extra'\]"):
        load_weights(model, weights, where="here")
    report = load_weights(model, weights, where="here", strict=False)
    assert report.loaded == 1 and model.weight.eq(1).all()
    with pytest.raises(ValueError, match="of another shape"):
        load_weights(model, {"weight": torch.ones(4, 3)}, where="here", strict=False)
    with pytest.raises(FileNotFoundError, match="gone"):
        read_weights(tmp_path / "gone.safetensors", where="model.from_pretrained")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        read_weights(tmp_path / "bad.safetensors")
