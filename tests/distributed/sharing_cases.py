"""Encodes batches alone and shared with the other ranks; started by tests/conditioning/test_sharing.py.

python tests/distributed/sharing_cases.py FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from opensora_like.conditioning.encode import Encode
from opensora_like.conditioning.sharing import Sharing, build_sharing
from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.models.autoencoders.hunyuan_vae import HunyuanVAE
from opensora_like.models.autoencoders.wan_vae import WanVAE
from opensora_like.models.image_encoders import CLIPImageEncoder
from opensora_like.models.mmdit import MMDiT
from opensora_like.models.text_encoders import CLIPTextEncoder, T5TextEncoder
from opensora_like.models.wan import Wan
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


def build_wan(sharing=None) -> Encode:
    """Published image-to-video conditions: clips that are grey but for the given frames, and an encoder of images."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 24, "num_layers": 1, "text_dim": 16}
    return Encode(
        Wan(**sizes, in_channels=36, image_dim=16, text_length=8, ungiven="grey"),
        WanVAE(tiny={}),
        {
            "text": T5TextEncoder(max_length=8, dtype="fp32", tiny={"hidden_size": 16, "num_layers": 1}),
            "image_embeds": CLIPImageEncoder(tiny={}, dtype="fp32"),
        },
        seed=1,
        device=torch.device("cpu"),
        dropout_ratio={},
        condition_config={"t2v": 1.0, "i2v_head": 1.0},
        guidance=1.0,
        sample_posterior=False,
        sharing=sharing,
    )


def dealt(batch: Batch, sharing: Sharing) -> Batch:
    """As ranks get it that deal the reading."""
    places = sharing.places(len(batch), batch.index)
    return replace(batch, places=places, video_BCTHW=batch.video_BCTHW[places] if places else None)


def make_batch(size: int) -> Batch:
    torch.manual_seed(size)
    video = torch.rand(size, 3, 5, 16, 16) * 2 - 1
    texts = [f"clip {i} of {size}" for i in range(size)]
    return Batch(0, size, BucketShape("16px", 5, 16, 16), list(range(size)), texts, texts, video_BCTHW=video)


def compare(rank: int, folder: Path) -> None:
    """Of several sizes of batch: the largest difference from encoding alone, and how many samples were encoded."""
    torch.set_num_threads(1)
    sharing = build_sharing(0, dp_size=1)
    found = {}
    for make, sizes in ((build, (1, 2, 3, 5)), (build_wan, (1, 5))):
        alone, shared = make(), make(sharing)
        counted = count_calls(shared)
        for size in sizes:
            counted.clear()
            batch = make_batch(size)
            want, have = alone(batch), shared(dealt(batch, sharing))
            differences = [(have.x0_BCTHW - want.x0_BCTHW).abs().max()]
            differences += [(have.conditions[n] - want.conditions[n]).abs().max() for n in want.conditions]
            differences += [(have.given_BT != want.given_BT).float().max()]
            whole = sum(z.double().sum().item() for z in (have.x0_BCTHW, *have.conditions.values()))
            found[f"{make.__name__} {size}"] = (max(d.item() for d in differences), max(counted), whole)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def count_calls(encode: Encode) -> list[int]:
    """Gets the number of samples of every call of an encoder."""
    counted: list[int] = []
    methods = [(encode.autoencoder, "posterior"), (encode.autoencoder, "encode")]
    methods += [(e, "encode_images" if hasattr(e, "encode_images") else "encode") for e in encode.encoders.values()]
    for module, method in methods:
        inner = getattr(module, method)
        setattr(module, method, lambda given, *more, inner=inner: (counted.append(len(given)), inner(given, *more))[1])
    return counted


if __name__ == "__main__":
    given = Path(sys.argv[1])
    codes = World(NUM_RANKS, lambda rank: compare(rank, given), log=given / "log.txt").join()
    sys.exit((given / "log.txt").read_text() if any(codes) else 0)
