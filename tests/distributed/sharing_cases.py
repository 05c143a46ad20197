"""Encodes batches alone and shared with the other ranks; started by tests/conditioning/test_sharing.py.

python tests/distributed/sharing_cases.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from opensora_like.conditioning.encode import Encode
from opensora_like.conditioning.sharing import build_sharing
from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.models.autoencoders.hunyuan_vae import HunyuanVAE
from opensora_like.models.mmdit import MMDiT
from opensora_like.models.text_encoders import CLIPTextEncoder, T5TextEncoder
from tests.distributed.forks import World

NUM_RANKS = 3


def build(sharing=None) -> Encode:
    torch.manual_seed(0)
    model = MMDiT(
        in_channels=16, vec_in_dim=16, context_in_dim=16, hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1,
        axes_dim=(4, 4, 4), cond_embed=True,
    )  # fmt: skip
    autoencoder = HunyuanVAE(latent_channels=4, layers_per_block=1, norm_num_groups=2, block_out_channels=(4, 4, 8, 8))
    tiny = {"hidden_size": 16, "num_layers": 1}
    return Encode(
        model,
        autoencoder,
        {
            "text": T5TextEncoder(max_length=8, dtype="fp32", tiny=tiny),
            "pooled": CLIPTextEncoder(max_length=8, dtype="fp32", tiny=tiny),
        },
        seed=1,
        device=torch.device("cpu"),
        dropout_ratio={"text": 0.5, "pooled": 0.5},
        condition_config={"t2v": 1.0, "i2v_head": 1.0},
        guidance=4.0,
        sample_posterior=True,
        sharing=sharing,
    )


def make_batch(size: int) -> Batch:
    torch.manual_seed(size)
    video = torch.rand(size, 3, 5, 16, 16) * 2 - 1
    texts = [f"clip {i} of {size}" for i in range(size)]
    return Batch(0, size, BucketShape("16px", 5, 16, 16), list(range(size)), texts, texts, video_BCTHW=video)


def compare(rank: int, folder: Path) -> None:
    """Of several sizes of batch: the largest difference from encoding alone, and how many samples were encoded."""
    torch.set_num_threads(1)
    sharing = build_sharing(0, dp_size=1)
    alone, shared = build(), build(sharing)
    counted = []
    for name, module in (("autoencoder", shared.autoencoder), *shared.encoders.items()):
        method = "posterior" if name == "autoencoder" else "encode"
        inner = getattr(module, method)
        setattr(
            module, method, lambda given, inner=inner, name=name: (counted.append((name, len(given))), inner(given))[1]
        )
    found = {}
    for size in (1, 2, 3, 5):
        counted.clear()
        want, have = alone(make_batch(size)), shared(make_batch(size))
        differences = [(have.x0_BCTHW - want.x0_BCTHW).abs().max()]
        differences += [(have.conditions[n] - want.conditions[n]).abs().max() for n in want.conditions]
        encoded = max(number for name, number in counted)
        found[size] = (max(d.item() for d in differences), encoded, have.x0_BCTHW.double().sum().item())
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    given = Path(sys.argv[1])
    codes = World(NUM_RANKS, lambda rank: compare(rank, given), log=given / "log.txt").join()
    sys.exit((given / "log.txt").read_text() if any(codes) else 0)
