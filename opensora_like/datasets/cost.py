"""What a micro-batch costs, predicted from its shape, and the coefficients of that prediction from measured steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from opensora_like.datasets.bucket import Buckets, BucketShape


class Grid(NamedTuple):
    """How a clip becomes tokens.

    Args:
        temporal: frames of a latent frame; a causal autoencoder codes the first frame alone.
        spatial: pixels of a side of a token: the autoencoder's stride times the patch size.
    """

    temporal: int = 4
    spatial: int = 16

    def tokens(self, shape: BucketShape) -> int:
        """Tokens of a clip: 4k frames and 4k+1 frames give k and k+1 latent frames."""
        return -(-shape.num_frames // self.temporal) * (shape.height // self.spatial) * (shape.width // self.spatial)


@dataclass(frozen=True)
class CostModel:
    """Cost of a micro-batch; any one unit will do for balancing, seconds for predictions.

    per_micro_batch + batch size * (per_sample + per_token * L + per_token_pair * L**2 + per_pixel * pixels),
    where L counts the latent tokens of a sample. Text tokens are many or few, but the same in every sample, so what
    they add to the denoiser and what the text encoder takes is in per_sample and per_token. The autoencoder's
    share is per_pixel, the optimizer's and the launching of kernels per_micro_batch.

    Raises:
        ValueError: a negative or infinite coefficient, or none above 0.
    """

    per_token: float
    per_token_pair: float = 0.0
    per_sample: float = 0.0
    per_pixel: float = 0.0
    per_micro_batch: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < np.inf:
                raise ValueError(f"cost.{name}={value!r} must be a number of 0 or more")
        if not any(asdict(self).values()):
            raise ValueError("cost: every coefficient is 0, so that every micro-batch costs nothing; give per_token")

    @property
    def coefficients(self) -> np.ndarray:
        """float64 [5], in the order of `features`."""
        return np.array([getattr(self, name) for name in COEFFICIENTS])

    def of(self, shapes: Sequence[BucketShape], batch_sizes: Sequence[int] | np.ndarray, grid: Grid) -> np.ndarray:
        """Cost of a micro-batch of each shape. Returns: float64 [shapes]."""
        return features(shapes, batch_sizes, grid) @ self.coefficients

    def of_buckets(self, buckets: Buckets, grid: Grid) -> np.ndarray:
        """Cost of a micro-batch of each bucket. Returns: float64 [buckets]."""
        return self.of(buckets.shapes, buckets.batch_sizes, grid)


COEFFICIENTS = tuple(field.name for field in fields(CostModel))


def tokens_of(buckets: Buckets, grid: Grid) -> np.ndarray:
    """Latent tokens of one sample of each bucket. Returns: int64 [buckets]."""
    return np.array([grid.tokens(shape) for shape in buckets.shapes], np.int64)


def features(shapes: Sequence[BucketShape], batch_sizes: Sequence[int] | np.ndarray, grid: Grid) -> np.ndarray:
    """What each coefficient is multiplied with. Returns: float64 [shapes, 5]."""
    tokens = np.array([grid.tokens(shape) for shape in shapes], np.float64)
    pixels = np.array([shape.num_frames * shape.height * shape.width for shape in shapes], np.float64)
    batch = np.asarray(batch_sizes, np.float64)
    return np.stack([batch * tokens, batch * tokens**2, batch, batch * pixels, np.ones(len(batch))], axis=1)


class Measured(NamedTuple):
    """Seconds that one micro-batch took on one rank."""

    shape: BucketShape
    batch_size: int
    seconds: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Measured:
        """From ``{num_frames, height, width, batch_size, seconds}``.

        Raises:
            ValueError: one of them is missing or not above 0.
        """
        names = ("num_frames", "height", "width", "batch_size", "seconds")
        values = [record.get(name) for name in names]
        for name, value in zip(names, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < np.inf:
                raise ValueError(f"measured micro-batch {dict(record)!r}: {name}={value!r} must be a number above 0")
        frames, height, width, batch_size, seconds = values
        return cls(BucketShape("", int(frames), int(height), int(width)), int(batch_size), float(seconds))


class Fit(NamedTuple):
    """A cost model in seconds, and how far it is from what was measured: relative errors [mean, worst]."""

    model: CostModel
    mean_error: float
    worst_error: float


def calibrate(measured: Iterable[Measured], grid: Grid) -> Fit:
    """The non-negative coefficients with the smallest squared relative error.

    Args:
        measured: of at least 3 different shapes or batch sizes; what they do not tell apart (an autoencoder's time
            from the denoiser's, at one resolution) is shared out arbitrarily and predicts the same.

    Raises:
        ValueError: fewer than 3 different measurements.
    """
    rows = list(measured)
    kinds = {(row.shape[1:], row.batch_size) for row in rows}
    if len(kinds) < 3:
        raise ValueError(
            f"calibration needs micro-batches of 3 or more different sizes, got {len(kinds)} in {len(rows)} "
            "measurements; measure more buckets"
        )
    seconds = np.array([row.seconds for row in rows])
    x = features([row.shape for row in rows], [row.batch_size for row in rows], grid) / seconds[:, None]
    scale = np.abs(x).max(axis=0)
    found = _non_negative(x / scale, np.ones(len(rows))) / scale
    error = np.abs(x @ found - 1)
    model = CostModel(**dict(zip(COEFFICIENTS, found.tolist(), strict=True)))
    return Fit(model, float(error.mean()), float(error.max()))


def _non_negative(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares with coefficients of 0 or more: of the 31 choices of what is not 0, the best that is allowed."""
    best, least = np.zeros(x.shape[1]), np.inf
    for choice in range(1, 2 ** x.shape[1]):
        columns = np.flatnonzero([choice >> i & 1 for i in range(x.shape[1])])
        solution = np.linalg.lstsq(x[:, columns], y, rcond=None)[0]
        loss = float(((x[:, columns] @ solution - y) ** 2).sum())
        if (solution >= 0).all() and loss < least * (1 - 1e-9):  # fewer coefficients win where they are as good
            best, least = np.zeros(x.shape[1]), loss
            best[columns] = solution
    return best
