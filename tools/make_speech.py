"""Write a training set of speech whose truth is known: a coloured shape that is as large as its sound is loud.

python tools/make_speech.py --output data/speech --num_clips 1000

OUTPUT/clips/*.mp4, *.wav   the clips and their sound
OUTPUT/clips.csv            path, audio_path, text and the truth (colour, shape) of every clip; what training reads
OUTPUT/world.json           the settings of this set

The same settings write the same bytes (with the same version of PyAV); more clips begin with the same ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from opensora_like.evaluation import world  # noqa: E402
from opensora_like.evaluation.speaking import FPS, draw_spoken, write_wav  # noqa: E402
from opensora_like.evaluation.world import Combination  # noqa: E402
from tools.make_shapes import SIZES, check_output, empty_folder, encode, write_table  # noqa: E402


@dataclass(frozen=True)
class SpeechSet:
    """What to write.

    Args:
        size: pixels per side, even, 16 to 256.
        num_frames: per clip.

    Raises:
        ValueError: a value out of range.
    """

    num_clips: int = 1000
    size: int = 64
    num_frames: int = 17
    fps: int = FPS
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_clips", 1), ("num_frames", 2), ("fps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {least} or more")
        if not SIZES[0] <= self.size <= SIZES[1] or self.size % 2:
            raise ValueError(f"size={self.size!r} must be an even number from {SIZES[0]} to {SIZES[1]}")

    def truths(self) -> list[Combination]:
        """What each row shows, in order: every colour with every shape, equally often."""
        kinds = list(dict.fromkeys(c._replace(direction="") for c in world.all_combinations()))
        return world.assign(kinds, self.num_clips, seed=self.seed)


def write_set(what: SpeechSet, output: Path, *, overwrite: bool = False) -> None:
    """Write clips, sounds and the table below `output`. The table comes last, so a set that was cut off has none.

    Raises:
        ValueError: `output` holds a set already and `overwrite` is not given.
    """
    table = output / "clips.csv"
    folder = empty_folder(output, [table], overwrite=overwrite)
    rows = []
    for index, truth in enumerate(what.truths()):
        clip = draw_spoken(truth, what.seed, index, size=what.size, num_frames=what.num_frames, fps=what.fps)
        path, sound = (folder / f"{index:06d}{suffix}" for suffix in (".mp4", ".wav"))
        encode(path, clip.frames_THWC, fps=what.fps, codec="h264")
        write_wav(sound, clip.sound_S)
        rows.append((path.as_posix(), sound.as_posix(), truth.caption, truth.colour, truth.shape))
    (output / "world.json").write_text(json.dumps(asdict(what), indent=2) + "\n")
    write_table(table, ("path", "audio_path", "text", "colour", "shape"), rows)


def prepare(arguments: list[str]) -> Callable[[], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder; the paths in clips.csv begin with it as given")
    add("--num_clips", type=int, default=SpeechSet.num_clips, help="default %(default)s")
    add("--size", type=int, default=SpeechSet.size, help="pixels per side, even, 16 to 256; default %(default)s")
    add("--num_frames", type=int, default=SpeechSet.num_frames, help="default %(default)s")
    add("--fps", type=int, default=SpeechSet.fps, help="default %(default)s")
    add("--seed", type=int, default=SpeechSet.seed, help="default %(default)s")
    add("--overwrite", action="store_true", help="replace the set in OUTPUT")
    given = vars(parser.parse_args(arguments))
    output, overwrite = given.pop("output"), given.pop("overwrite")
    what = SpeechSet(**given)
    check_output(output, overwrite=overwrite)

    def work() -> int:
        write_set(what, output, overwrite=overwrite)
        print(f"{output / 'clips.csv'}: {what.num_clips} clips")
        return 0

    return work


if __name__ == "__main__":
    from opensora_like.cli import run_guarded

    sys.exit(run_guarded(prepare))
