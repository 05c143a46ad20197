"""tools/convert.py: layouts of published weights, there and back, from checkpoints and files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.pieces import Piece, write_pieces
from opensora_like.checkpoint.weights import read_weights
from opensora_like.config import read_config

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_tool", ROOT / "tools/convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights_of(golden: str) -> dict[str, torch.Tensor]:
    """Weights recorded from the published code, under its names."""
    found = load_file(GOLDEN / f"{golden}.safetensors")
    return {n.removeprefix("weights/"): t for n, t in found.items() if n.startswith("weights/")}


def run(tool: ModuleType, *arguments: object) -> dict[str, torch.Tensor]:
    """Convert. Returns: what is in the folder that it wrote, its second argument."""
    assert tool.prepare([str(a) for a in arguments])() == 0
    return read_weights(arguments[1])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    ("golden", "model", "there", "back"),
    [
        ("mmdit_fused_small_a", "mmdit", ["--to", "split"], ["--to", "fused"]),
        ("mmdit_split_i2v_small_a", "mmdit", ["--to", "fused"], ["--to", "split"]),
        (
            "mmdit_fused_small_a",
            "mmdit",
            ["--to", "split", "--rope", "interleaved:liger"],
            ["--to", "fused", "--rope", "liger:interleaved"],
        ),
        ("mmdit_fused_small_a", "mmdit", ["--to", "diffusers"], ["--to", "fused"]),
        ("wan_t2v_a", "wan", ["--to", "diffusers"], ["--to", "original"]),
        ("wan_i2v_a", "wan", ["--to", "diffusers"], ["--to", "original"]),
    ],
)
def test_there_and_back(
    tool: ModuleType, tmp_path: Path, golden: str, model: str, there: list[str], back: list[str]
) -> None:
    """Published weights come back bit for bit; on the way they have other names, or other rows."""
    published = weights_of(golden)
    save_file(published, tmp_path / "in.safetensors")
    other = run(tool, tmp_path / "in.safetensors", tmp_path / "a", "--model", model, "--max_shard_size", "20KB", *there)
    assert not same(other, published)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert same(run(tool, tmp_path / "a", tmp_path / "b", "--model", model, *back), published)
    again = run(tool, tmp_path / "in.safetensors", tmp_path / "c", "--model", model, *back[:2])
    assert same(again, published), "a layout that is there already stays"


def test_a_checkpoint_gives_its_ema_or_its_weights(tool: ModuleType, tmp_path: Path) -> None:
    """EMA by default, the weights with --raw, in the dtype asked for."""
    published = weights_of("mmdit_fused_small_a")
    folder = tmp_path / layout.checkpoint_name(0, 1)
    folder.mkdir()
    pieces = []
    for kind, factor in (("master", 1), ("ema", 2)):
        for name, tensor in published.items():
            flat = (factor * tensor.float()).flatten()
            pieces.append(Piece(kind, name, tuple(tensor.shape), 0, flat.numel(), flat))
    write_pieces(folder, 0, pieces)
    (folder / layout.STATE_FILE).write_text("{}")
    for number, (flags, factor) in enumerate((([], 2), (["--raw"], 1))):
        found = run(
            tool, folder, tmp_path / str(number), "--model", "mmdit", "--to", "fused", "--dtype", "bf16", *flags
        )
        assert same(found, {n: (factor * t.float()).bfloat16() for n, t in published.items()})


def test_mistakes_are_named(tool: ModuleType, tmp_path: Path) -> None:
    """Another model's layout, weights of something else, an order of pairs that the model does not have."""
    save_file(weights_of("wan_t2v_a"), tmp_path / "in.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    for file, arguments, message in (
        ("in", ["--model", "wan", "--to", "fused"], "layouts"),
        ("in", ["--model", "wan", "--to", "original", "--rope", "liger:interleaved"], "only mmdit"),
        ("other", ["--model", "mmdit", "--to", "fused"], "no weights of mmdit"),
    ):
        with pytest.raises(ValueError, match=message):
            tool.prepare([str(tmp_path / f"{file}.safetensors"), str(tmp_path / "out"), *arguments])


def test_a_yaml_becomes_a_config(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`config` writes a file that reads back and prints every key; a file that exists is not written over."""
    (tmp_path / "in.yaml").write_text(
        "model: {pretrained_model_name_or_path: Wan-AI/Wan2.1-T2V-14B-Diffusers}\n"
        "optim: {learning_rate: 1e-6}\nfsdp: {dp_size: 8, pp_size: 1}\n"
    )
    out = tmp_path / "made/out.py"
    assert tool.prepare(["config", str(tmp_path / "in.yaml"), str(out), "--bucket", "480x832x33"])() == 0
    config = read_config(out).config
    assert config.optim["lr"] == 1e-6 and config.model["variant"] == "t2v-14B"
    assert dict(config.bucket_config["480x832"]) == {33: (1.0, 1)}
    printed = capsys.readouterr().out
    assert (
        "carried  optim.learning_rate -> optim.lr" in printed and "left out fsdp.pp_size: there are no pip" in printed
    )
    with pytest.raises(ValueError, match="new file"):
        tool.prepare(["config", str(tmp_path / "in.yaml"), str(out)])


def test_what_is_read_is_not_written_over(tool: ModuleType, tmp_path: Path) -> None:
    """Weights are read from the files while others are written: a folder into itself is refused, and stays whole."""
    weights = weights_of("wan_t2v_a")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(weights, file)
    for source in (tmp_path, file):
        with pytest.raises(ValueError, match="choose another folder"):
            tool.prepare([str(source), str(tmp_path), "--model", "wan", "--to", "diffusers"])
    assert same(load_file(file), weights)


def test_an_earlier_export_goes(tool: ModuleType, tmp_path: Path) -> None:
    """Shards with an index, then one file into the same folder, then other shards: the folder holds the last ones."""
    for number, size in enumerate(("20KB", "1GB", "10KB")):
        weights = {name: tensor + number for name, tensor in weights_of("wan_t2v_a").items()}
        save_file(weights, tmp_path / "source.safetensors")
        settings = ["--model", "wan", "--to", "original", "--max_shard_size", size]
        assert same(run(tool, tmp_path / "source.safetensors", tmp_path / "out", *settings), weights), size
