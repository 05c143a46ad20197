"""The causal 3D autoencoders of Wan: 4x8x8 pixels to a cell of 16 channels (2.1), 4x16x16 to one of 48 (2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
from torch import Tensor, nn

from opensora_like.models.autoencoders.loading import DTYPES, check_keys
from opensora_like.models.autoencoders.posterior import draw_latents
from opensora_like.models.autoencoders.sizes import causal_latent_shape
from opensora_like.models.autoencoders.wan_vae_versions import (
    VERSIONS,
    Version,
    is_version_2_2,
    to_diffusers_2_2,
    version_of,
)
from opensora_like.registry import MODELS, nearest
from opensora_like.rng import generator as make_generator

TINY = {"base_dim": 4, "num_res_blocks": 1, "seed": 0}
CONFIG_FILE = "config.json"


@MODELS.register_module("wan_vae")
class WanVAE(nn.Module):
    """diffusers' ``AutoencoderKLWan``; no frame depends on a later one. Frozen; latents are normed per channel.

    A clip is coded in chunks of 1, 4, 4, ... frames, so memory beyond the clip itself does not grow with its length.
    Built on ``meta`` it has the published sizes, and nothing is read.

    Args:
        from_pretrained: a diffusers folder (of the autoencoder, or of a pipeline with ``vae/`` in it), a name on the
            hub, or one file of weights (``Wan2.1_VAE.pth``, ``Wan2.2_VAE.pth`` or safetensors, original or diffusers
            names).
        version: "2.1", which the experts of Wan 2.2 use, too, or "2.2", that of TI2V-5B; weights must be of it.
        tiny: instead: sizes of a small autoencoder with fixed random weights, the same in every process; any of
            base_dim, num_res_blocks, seed. ``{}`` takes the defaults. For tests.
        dtype: of the weights, and of the computation; None keeps that of the file, or float32.
        use_slicing: one sample at a time.
        use_tiling: pictures with a side above `tile_size` in tiles, blended where they overlap.
        tile_size, tile_stride: pixels, multiples of 8 (16); tiles overlap by their difference. The encoder of "2.2"
            counts pixels that are folded 2x2, so its tiles are twice as wide.
        cache_dir: where hub downloads are kept.

    Raises:
        ValueError: both or neither of `from_pretrained` and `tiny`, weights or sizes that do not fit.
        FileNotFoundError: `from_pretrained` is a path and nothing is there.
        OSError: the folder or the hub has no such model.

    Source: Wan, arXiv:2503.20314, section 4.1; mean and std as its published config has them.
    """

    temporal_stride = 4
    is_causal = True
    has_deviation = True

    def __init__(
        self,
        from_pretrained: str | None = None,
        *,
        version: Version = "2.1",
        tiny: dict[str, int] | None = None,
        dtype: Literal["fp32", "bf16", "fp16"] | None = None,
        use_slicing: bool = False,
        use_tiling: bool = False,
        tile_size: int = 256,
        tile_stride: int = 192,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        on_meta = torch.get_default_device().type == "meta"
        if (from_pretrained is None) == (tiny is None) and not on_meta:
            raise ValueError(
                f"wan_vae: from_pretrained={from_pretrained!r} and tiny={tiny!r}; give exactly one of a folder, hub"
                " name or file, and the sizes of a tiny random autoencoder"
            )
        if version not in VERSIONS:
            raise ValueError(f"wan_vae: version={version!r} is not one of {sorted(VERSIONS)}")
        self.spatial_stride: int = VERSIONS[version].get("scale_factor_spatial", 8)
        _check_tiles(tile_size, tile_stride, self.spatial_stride)
        target = None if dtype is None else DTYPES[dtype]
        if tiny is not None:
            self.model = _build_tiny(tiny, version)
        else:
            self.model = _build_published(version) if on_meta else _load(from_pretrained, target, cache_dir=cache_dir)
        self.model.to(target).requires_grad_(False).eval()
        _check_published(self.model.config, version, where=f"wan_vae: from_pretrained={from_pretrained!r}")
        self.latent_channels = int(self.model.config.z_dim)
        shape = (1, -1, 1, 1, 1)
        # plain tensors: a cast of the module to bfloat16 would round buffers
        self._mean = torch.tensor(self.model.config.latents_mean, device="cpu").view(shape)
        self._std = torch.tensor(self.model.config.latents_std, device="cpu").view(shape)
        if use_slicing:
            self.model.enable_slicing()
        if use_tiling:
            self.model.enable_tiling(tile_size, tile_size, tile_stride, tile_stride)

    def train(self, mode: bool = True) -> WanVAE:
        """Stays in evaluation mode: the autoencoder is frozen."""
        return super().train(False)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip.

        Raises:
            ValueError: `num_frames` is not 4k+1 (the last frames would be lost), or a side is no multiple of
                `spatial_stride`.
        """
        return causal_latent_shape(self, num_frames, height, width, where="wan_vae")

    def encode(self, video_BCTHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents for the denoiser.

        Args:
            video_BCTHW: [B, 3, T, H, W] in [-1, 1], any floating dtype.
            generator: samples the posterior, one draw for the whole batch; without it the mean is taken, as the
                published models were trained.

        Returns: float32 [B, C, (T-1)/4+1, H/8, W/8], of "2.2" with 16 in the place of 8.

        Raises:
            ValueError: a size that cannot be coded, see `latent_shape`.
        """
        return draw_latents(*self.posterior(video_BCTHW), generator)

    def posterior(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the normed latents, each float32 and shaped as `encode` gives them."""
        self.latent_shape(*video_BCTHW.shape[2:])
        published = self.model.encode(video_BCTHW.to(self.model.dtype)).latent_dist
        return self._normed(published.mean, published.logvar)

    def latents_of(self, mean: Tensor, log_variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample or mean of the posterior, normed per channel; float32.

        Mean and deviation are both normed: a published trainer norms the mean alone and then adds noise of the size
        it had before, 1.1 to 3.3 times too much.
        """
        return draw_latents(*self._normed(mean, log_variance), generator)

    def _normed(self, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
        centre, norm = self._norms_on(mean.device)
        return (mean.float() - centre) / norm, torch.exp(0.5 * log_variance.float()) / norm

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Pixels [B, 3, (T-1)*4+1, H*8, W*8] (of "2.2": 16), clipped to [-1, 1], in the dtype of the weights."""
        centre, norm = self._norms_on(z_BCTHW.device)
        return self.model.decode((z_BCTHW.float() * norm + centre).to(self.model.dtype)).sample

    def _norms_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the channels."""
        return self._mean.to(device, non_blocking=True), self._std.to(device, non_blocking=True)


def _check_tiles(tile_size: int, tile_stride: int, multiple: int) -> None:
    if tile_size < 1 or tile_size % multiple or tile_stride % multiple or not 0 < tile_stride <= tile_size:
        raise ValueError(
            f"wan_vae: tile_size={tile_size} and tile_stride={tile_stride} must be multiples of {multiple} with"
            " 0 < tile_stride <= tile_size"
        )


def _check_published(config: Mapping, version: Version, *, where: str) -> None:
    """Refuse another autoencoder than `version`."""
    if (found := version_of(config)) != version:
        described = f"version={found!r}" if found else "no published version: another patch size or stride"
        raise ValueError(f"{where} is of {described}, and version={version!r}; set autoencoder.version to fit")
    counts = {len(config.latents_mean), len(config.latents_std), config.z_dim}
    if len(counts) != 1:
        raise ValueError(f"{where} has {config.z_dim} channels, but latents_mean and latents_std of other lengths")


def _load(source: str, dtype: torch.dtype | None, *, cache_dir: str | None) -> nn.Module:
    from diffusers import AutoencoderKLWan

    where = f"wan_vae: from_pretrained={source!r}"
    path = Path(source)
    if path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        return _load_file(path, where=where)
    if source.startswith(("/", "./", "../", "~")) and not path.is_dir():
        raise FileNotFoundError(f"{where} is not a folder; download the model there")
    options = {"subfolder": "vae"} if path.is_dir() and not (path / CONFIG_FILE).is_file() else {}
    try:
        model, report = AutoencoderKLWan.from_pretrained(
            source, **options, torch_dtype=dtype, cache_dir=cache_dir, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{where} is neither a folder with an autoencoder (or with vae/ in it) nor one the hub gives; give a local"
            " folder, or check the name and the network"
        ) from error
    if missing := report["missing_keys"]:
        raise ValueError(f"{where}: {len(missing)} weights are missing, {sorted(missing)[:4]}; it is not whole")
    return model


def _load_file(path: Path, *, where: str) -> nn.Module:
    """The published architecture, of the width that the file has, with the file's weights."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    weights = _read_file(path, where)
    settings = VERSIONS["2.2" if is_version_2_2(weights) else "2.1"]
    if "encoder.conv1.weight" in weights:
        rename = to_diffusers_2_2 if is_version_2_2(weights) else convert_wan_vae_to_diffusers
        weights = rename(weights)
    if "encoder.conv_in.weight" not in weights:
        raise ValueError(f"{where} holds no Wan autoencoder; its first tensors are {sorted(weights)[:4]}")
    widths = {"base_dim": len(weights["encoder.conv_in.weight"])}
    if "decoder.norm_out.gamma" in weights:
        widths["decoder_base_dim"] = len(weights["decoder.norm_out.gamma"])
    with torch.device("meta"):
        model = AutoencoderKLWan(**{**settings, **widths})
    check_keys(model, weights, where=where)
    model.load_state_dict(weights, assign=True)
    return model


def _read_file(path: Path, where: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{where} is not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError) as problem:
        raise ValueError(f"{where} cannot be read as {path.suffix}: {problem}") from problem
    return weights.get("state_dict", weights)


def _build_published(version: Version) -> nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**VERSIONS[version])


def _build_tiny(tiny: Mapping[str, int], version: Version) -> nn.Module:
    """A small autoencoder whose weights are a function of (seed, name)."""
    from diffusers import AutoencoderKLWan

    for key in tiny:
        if key not in TINY:
            raise ValueError(f"wan_vae: tiny has no {key!r}; {nearest(key, TINY)}")
    sizes = {**TINY, **tiny}
    widths = {"base_dim": sizes["base_dim"], "num_res_blocks": sizes["num_res_blocks"], "decoder_base_dim": None}
    with torch.random.fork_rng(devices=[]):  # torch draws weights of its own first
        model = AutoencoderKLWan(**{**VERSIONS[version], **widths})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = make_generator(sizes["seed"], f"tiny wan_vae {name}")
            noise = torch.randn(parameter.shape, generator=draw, device="cpu").to(parameter.device)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model
