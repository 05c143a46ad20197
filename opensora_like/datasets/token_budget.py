"""The buckets of a run that VideoX-Fun would describe by sample sizes and a token length."""

from __future__ import annotations

STEP = 128  # pixels between the sizes of a run
LEAST_SPEECH = 256  # side of the smallest square of a run that names no size of images
BASE = 512  # side of the square that the published shapes are listed for
UNLISTED = (672, 352)  # the one shape of the rule below that the published list leaves out


def sizes_of(*, image_size: int, video_size: int) -> list[int]:
    """Sides, in pixels, of the squares whose areas are trained: from the video's to the image's, rising.

    Source: VideoX-Fun, get_length_to_frame_num.
    """
    if image_size <= video_size:
        return [image_size]
    sizes = list(range(video_size, image_size + 1, STEP))
    return sizes if sizes[-1] == image_size else [*sizes, image_size]


def frames_at(size: int, *, token_size: int, num_frames: int) -> int:
    """How many frames a clip of `size` squared has within the budget of `num_frames` frames of `token_size` squared.

    Always 4k+1, at most `num_frames` and at least 1. The published code rounds otherwise and may exceed the budget, its
    documents do not: 49 frames at 512 are 9 at 1024, not 13.
    """
    pixels = min(num_frames * token_size**2 // size**2, num_frames)
    return max(1, (pixels - 1) // 4 * 4 + 1)


def published_shapes(size: int, *, multiple: int) -> list[tuple[int, int]]:
    """(height, width) of the published shapes of about `size` squared pixels, from the widest to the highest.

    At 512 they are the multiples of 32 with sides of 1 to 4 at most and 0.9 to 1 of the square's pixels; others are
    these, scaled and rounded down.

    Args:
        multiple: of the sides: 16, and 32 for TI2V-5B of Wan 2.2.

    Raises:
        ValueError: a size at which a side would be 0.

    Source: VideoX-Fun, ASPECT_RATIO_512.
    """
    sides = range(32, 4 * BASE, 32)
    listed = [(h, w) for h in sides for w in sides if max(h, w) <= 4 * min(h, w) and 0.9 <= h * w / BASE**2 <= 1]
    scaled = [
        tuple(side * size // BASE // multiple * multiple for side in shape) for shape in listed if shape != UNLISTED
    ]
    if not all(map(min, scaled)):
        raise ValueError(f"sample size {size} is too small for sides that are multiples of {multiple}; use {2 * size}")
    by_ratio = {height / width: (height, width) for height, width in scaled}  # small sizes round several to one
    return [by_ratio[ratio] for ratio in sorted(by_ratio)]


def bucket_config_of(
    *,
    image_size: int | None,
    video_size: int,
    token_size: int,
    num_frames: int,
    batch_size: int = 1,
    multiple: int | None = None,
) -> dict[str, dict[int, tuple[float, int]]]:
    """A `bucket_config` for these settings: each clip goes, with equal chance, to any of the sizes that it is not
    enlarged for. A clip that is too short for its size's frames counts as an image.

    Args:
        image_size, video_size, token_size: sides of squares in pixels: the largest size, the smallest, and the one at
            which a clip has `num_frames`. None for `image_size` is a run of clips alone, as FantasyTalking's: there
            `video_size` is the largest, 256 the smallest.
        multiple: of the sides of `published_shapes`, which are then listed; None leaves the shapes to this program.

    Raises:
        ValueError: a number below 1.

    Source: VideoX-Fun, scripts/wan2.2/train.py and scripts/fantasytalking/train.py.
    """
    given = {
        "image_sample_size": image_size,
        "video_sample_size": video_size,
        "token_sample_size": token_size,
        "video_sample_n_frames": num_frames,
        "train_batch_size": batch_size,
    }
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    found: dict[str, dict[int, tuple[float, int]]] = {}
    ends = {"image_size": image_size, "video_size": video_size}
    if image_size is None:
        ends = {"image_size": video_size, "video_size": min(LEAST_SPEECH, video_size)}
    for place, size in enumerate(sizes_of(**ends), 1):
        # sizes are tried from the largest: kept with 1/k at the k-th, all k are equally likely
        keep = (round(1 / place, 6), batch_size)
        shapes = [] if multiple is None else published_shapes(size, multiple=multiple)
        name = ",".join(f"{height}x{width}" for height, width in shapes) or f"{size}px"
        images = {} if image_size is None else {1: keep}
        found[name] = {frames_at(size, token_size=token_size, num_frames=num_frames): keep} | images
    return found
