"""Write a training set whose truth is known: small clips of one coloured shape that moves.

python tools/make_shapes.py --output data/shapes --num_clips 2000

OUTPUT/clips/*.mp4     the clips
OUTPUT/clips.csv       path, text and the truth (colour, shape, direction) of every clip; what training reads
OUTPUT/seen.csv        one caption per combination that is in clips.csv: prompts to score what was learned
OUTPUT/held_out.csv    one caption per combination that is in no clip: prompts to score what was put together
OUTPUT/world.json      the settings of this set

The same settings write the same bytes (with the same version of PyAV); more clips begin with the same ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from opensora_like.evaluation import world
from opensora_like.evaluation.world import Combination
from opensora_like.rng import uniform

SIZES = (16, 256)
# codec -> (encoder, options). At 64 pixels, subsampled colour costs a mean error of about 1 of 255 levels once the
# clip is read at 16 x 16; every player shows yuv420p, and few show yuv444p.
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"crf": "8"}),
    "mpeg4": ("mpeg4", {"qmin": "1", "qmax": "2"}),
}


@dataclass(frozen=True)
class ShapesSet:
    """What to write.

    Args:
        size: pixels per side, even, 16 to 256. Below 64 the subsampled colour shows.
        num_frames: per clip. The whole way is made in a clip, so a reader that takes a part of it sees less motion.
        held_out: share of the combinations that no clip shows, 0 to 0.5.
        colours: names out of `world.COLOURS`.
        image_fraction: share of the rows that are still images, without a direction.
        codec: a name of `CODECS`.

    Raises:
        ValueError: a value out of range.
    """

    num_clips: int = 2000
    size: int = 64
    num_frames: int = 5
    fps: int = 8
    seed: int = 0
    held_out: float = 1 / 6
    colours: tuple[str, ...] = world.DEFAULT_COLOURS
    image_fraction: float = 0.0
    codec: str = "h264"

    def __post_init__(self) -> None:
        for name in ("num_clips", "num_frames", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be 1 or more")
        if not SIZES[0] <= self.size <= SIZES[1] or self.size % 2:
            raise ValueError(f"size={self.size!r} must be an even number from {SIZES[0]} to {SIZES[1]}")
        if not 0 <= self.image_fraction <= 1:
            raise ValueError(f"image_fraction={self.image_fraction!r} is not within 0 to 1")
        if self.codec not in CODECS:
            raise ValueError(f"codec={self.codec!r} is not one of {list(CODECS)}")

    def split(self) -> tuple[list[Combination], list[Combination]]:
        """(seen, held out)."""
        return world.split(world.all_combinations(self.colours), fraction=self.held_out, seed=self.seed)

    def truths(self) -> list[Combination]:
        """What each row shows, in order."""
        moving = world.assign(self.split()[0], self.num_clips, seed=self.seed)
        still = uniform(self.seed, "shapes still", 0, np.arange(self.num_clips)) < self.image_fraction
        return [c._replace(direction="") if s else c for c, s in zip(moving, still, strict=True)]

    def draw(self, index: int, truth: Combination) -> np.ndarray:
        """The pixels of row `index`, uint8 [T, H, W, C]; one frame without a direction."""
        num_frames = self.num_frames if truth.direction else 1
        return world.draw_clip(truth, world.clip_generator(self.seed, index), size=self.size, num_frames=num_frames)


def encode(path: Path, frames_THWC: np.ndarray, *, fps: int, codec: str) -> None:
    """Write a clip. One thread: the encoder's bytes depend on the number of threads, and so on the machine."""
    import av

    encoder, options = CODECS[codec]
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(encoder, rate=fps, options=options)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for pixels in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def write_row(what: ShapesSet, folder: Path, job: tuple[int, Combination]) -> str:
    """Draw and write one row. Returns: the file's path, as the table holds it."""
    from PIL import Image

    index, truth = job
    frames = what.draw(index, truth)
    path = folder / f"{index:06d}{'.mp4' if truth.direction else '.png'}"
    if truth.direction:
        encode(path, frames, fps=what.fps, codec=what.codec)
    else:
        Image.fromarray(frames[0]).save(path)
    return path.as_posix()


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to mix two sets in one folder."""
    if (output / "clips").exists() and not overwrite:
        raise ValueError(f"output={str(output)!r} holds clips already; give another folder or --overwrite")


def empty_folder(output: Path, tables: Sequence[Path], *, overwrite: bool) -> Path:
    """The folder of the clips, without those of another set, whose tables are gone first.

    Raises:
        ValueError: see `check_output`.
    """
    check_output(output, overwrite=overwrite)
    for table in tables:
        table.unlink(missing_ok=True)
    folder = output / "clips"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def write_set(what: ShapesSet, output: Path, *, num_workers: int = 1, overwrite: bool = False) -> None:
    """Write clips and tables below `output`. The tables come last, so a set that was cut off has none.

    Raises:
        ValueError: `output` holds a set already and `overwrite` is not given.
    """
    tables = [output / f"{name}.csv" for name in ("clips", "seen", "held_out")]
    folder = empty_folder(output, tables, overwrite=overwrite)
    truths = what.truths()
    write = partial(write_row, what, folder)
    if num_workers > 1:
        with ProcessPoolExecutor(num_workers) as pool:
            paths = list(pool.map(write, enumerate(truths), chunksize=32))
    else:
        paths = [write(job) for job in enumerate(truths)]
    (output / "world.json").write_text(json.dumps(asdict(what), indent=2) + "\n")
    header = ("text", *Combination._fields)
    write_table(tables[0], ("path", *header), [(p, t.caption, *t) for p, t in zip(paths, truths, strict=True)])
    for table, group in zip(tables[1:], what.split(), strict=True):
        write_table(table, header, [(c.caption, *c) for c in group])


def read_arguments(arguments: Sequence[str]) -> tuple[ShapesSet, Path, int, bool]:
    """(what, output, num_workers, overwrite) from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder; the paths in clips.csv begin with it as given")
    add("--num_clips", type=int, default=ShapesSet.num_clips, help="default %(default)s")
    add("--size", type=int, default=ShapesSet.size, help="pixels per side, even, 16 to 256; default %(default)s")
    add("--num_frames", type=int, default=ShapesSet.num_frames, help="default %(default)s")
    add("--fps", type=int, default=ShapesSet.fps, help="default %(default)s")
    add("--seed", type=int, default=ShapesSet.seed, help="default %(default)s")
    add("--held_out", type=float, default=ShapesSet.held_out, help="share of combinations never shown; default 1/6")
    add("--colours", type=str, default=",".join(world.DEFAULT_COLOURS), help=f"out of {','.join(world.COLOURS)}")
    add("--image_fraction", type=float, default=0.0, help="share of rows that are still images; default 0")
    add("--codec", choices=list(CODECS), default=ShapesSet.codec, help="default %(default)s")
    add("--num_workers", type=int, default=1, help="processes; default 1")
    add("--overwrite", action="store_true", help="replace the set in OUTPUT")
    given = vars(parser.parse_args(arguments))
    output, num_workers, overwrite = (given.pop(k) for k in ("output", "num_workers", "overwrite"))
    given["colours"] = tuple(given["colours"].split(","))
    return ShapesSet(**given), output, num_workers, overwrite


def prepare(arguments: list[str]) -> Callable[[], int]:
    what, output, num_workers, overwrite = read_arguments(arguments)
    seen, held_out = what.split()
    check_output(output, overwrite=overwrite)

    def work() -> int:
        write_set(what, output, num_workers=num_workers, overwrite=overwrite)
        print(f"{output / 'clips.csv'}: {what.num_clips} clips of {len(seen)} combinations, {len(held_out)} held out")
        return 0

    return work


if __name__ == "__main__":
    import sys

    from opensora_like.cli import run_guarded

    sys.exit(run_guarded(prepare))
