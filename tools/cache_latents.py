"""Encode videos and captions once: latents, text embeddings and first frames, for training without encoders.

python tools/cache_latents.py --video_folder VIDEOS --output_folder OUT --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    --height 480 --width 832 --center-crop [--mode frames --num-frames 40] [--output_format automodel]
python tools/cache_latents.py scan VIDEOS                             writes VIDEOS/meta.json, for captions
python tools/cache_latents.py CONFIG --out OUT [--section.key value]  what a training config reads and encodes
python tools/cache_latents.py --from_meta FOLDER --output_folder OUT [--model MODEL]   .meta files to a store

Clips are those of meta.json in the folder (a list of file_name, start_frame, end_frame, vila_caption), of a list in
csv, parquet, json or jsonl (--captions), or all videos, with captions beside them (a.jsonl, a.json, a.txt of a.mp4).
OUT is a store, which dataset.type="latents" trains on, or with --output_format automodel a folder of .meta files.

Under torchrun every process takes its share. A command that is given again goes on where it was. A clip that cannot be
made is listed in OUT/failures.rank*.jsonl with the reason, and the others are made. Flags may be written with - or _.

Exit status: 0, or 1 if there is not one sample, or 2 if the command line or the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opensora_like.cli import read_command_line, run_guarded
from opensora_like.preparation.captions import Format, Missing, list_clips
from opensora_like.preparation.frames import FrameChoice, Picture, ResizeMode, Rule, Select

if TYPE_CHECKING:
    import torch

    from opensora_like.runtime import Runtime

# what the published tools call an output -> what it is here
OUTPUTS = {"store": "store", "safetensors": "store", "automodel": "meta", "meta": "meta"}
DAYS = 14 * 24 * 60.0  # minutes that a process waits for the others, whose clips may be longer
Work = Callable[[], int]


def underscored(arguments: list[str]) -> list[str]:
    """Every flag with "_" in the place of "-"."""
    split = [argument.partition("=") for argument in arguments]
    return [
        (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value
        for name, equals, value in split
    ]


def video_parser() -> argparse.ArgumentParser:
    """The flags of the published preparation scripts, and ours."""
    parser = argparse.ArgumentParser(
        prog="cache_latents.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--video_folder", "--video_dir", type=Path, help="searched with all below it")
    add("--output_folder", "--output_dir", type=Path, required=True, help="of the store or the .meta files")
    add("--output_format", choices=sorted(OUTPUTS), default="store", help="safetensors means store, meta automodel")
    add("--from_meta", type=Path, metavar="FOLDER", help="convert .meta files instead of encoding videos")
    add("--read_ahead", type=int, default=2, help="threads that decode the next clips; default 2")
    add("--verify", type=int, default=0, metavar="K", help="decode K samples at the end, print PSNR to their videos")
    add("--verify_folder", type=Path, help="write them there, source and decoded side by side")
    _add_frames(parser.add_argument_group("frames"))
    _add_picture(parser.add_argument_group("size"))
    _add_captions(parser.add_argument_group("captions"))
    _add_models(parser.add_argument_group("models"))
    return parser


def _add_frames(group: Any) -> None:
    add = group.add_argument
    add("--mode", choices=("video", "frames"), default="video", help="one sample per clip, or per frame")
    add("--num_frames", type=int, help="of mode frames: evenly spaced frames per clip; default 10")
    add("--target_frames", type=int, help="of mode video: most frames of a sample, 4n+1; default all")
    add("--select", choices=get_args(Select), default="head", help="which target_frames of a longer clip")
    add("--window_stride", type=int, help="of --select windows; default target_frames")
    add("--fps", type=float, help="leave frames out of faster clips until they play at this rate")
    add("--frame_rule", choices=get_args(Rule), default="floor", help="what to do if frames are not 4n+1")


def _add_picture(group: Any) -> None:
    add = group.add_argument
    add("--height", type=int, help="pixels, a multiple of 16; with --width. Default: the clip's, to the nearest")
    add("--width", type=int)
    add("--resize_mode", choices=get_args(ResizeMode), default="bilinear")
    add("--antialias", action="store_true", help="average over what is made smaller (bilinear, bicubic)")
    add("--center_crop", action="store_true", help="cover the size and cut the middle out; else fit into it")
    add("--no_center_crop", dest="center_crop", action="store_false", help="(default)")
    add("--no_aspect_ratio", action="store_true", help="stretch to the size")


def _add_captions(group: Any) -> None:
    add = group.add_argument
    add("--captions", type=Path, metavar="LIST", help="csv, parquet, json or jsonl of file_name and caption")
    add("--caption_format", choices=get_args(Format), default="auto")
    add("--caption_field", help="default: vila_caption, gemini_v2_caption, caption or text, the first that is there")
    add("--missing_caption", choices=get_args(Missing), default="error", help="of a clip without; default error")


def _add_models(group: Any) -> None:
    add = group.add_argument
    add("--model", help="folder or hub name of a Wan 2.1 pipeline (vae, text_encoder, tokenizer)")
    add("--autoencoder", help="in place of the model's: a folder, or a file as Wan2.1_VAE.pth")
    add("--text_encoder", help="in place of the model's: a folder with a umT5 and its tokenizer")
    add("--max_length", "--max_sequence_length", type=int, default=512, help="tokens of a caption; default 512")
    add("--vae_dtype", choices=("fp32", "bf16", "fp16"), help="default: that of the weights")
    add("--text_dtype", choices=("bf16", "fp32"), default="bf16")
    add("--latents_dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="in which they are kept")
    add("--tiling", "--memory_optimization", action="store_true", help="pictures in tiles, which blend: less memory")
    add("--no_tiling", "--no_memory_optimization", dest="tiling", action="store_false", help="(default)")
    posterior = group.add_mutually_exclusive_group()
    posterior.add_argument("--stochastic", action="store_true", help="draw latents from the posterior, not its mean")
    posterior.add_argument("--deterministic", dest="stochastic", action="store_false", help="its mean (default)")
    add("--seed", type=int, default=42, help="of --stochastic in .meta files")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def check_verify(given: argparse.Namespace) -> None:
    if given.verify_folder is not None and given.verify < 1:
        raise ValueError(f"--verify_folder {given.verify_folder}: nothing is decoded without --verify K")


def frames_of(given: argparse.Namespace) -> FrameChoice:
    num_frames = 10 if given.mode == "frames" and given.num_frames is None else given.num_frames
    parts = (given.target_frames, given.select, given.window_stride, given.fps, given.frame_rule)
    return FrameChoice(given.mode, num_frames, *parts)


def picture_of(given: argparse.Namespace) -> Picture:
    fits = (given.resize_mode, given.center_crop, not given.no_aspect_ratio, given.antialias)
    return Picture(given.height, given.width, *fits)


def prepare_videos(arguments: list[str]) -> Work:
    """Encode a folder of videos, or convert .meta files."""
    parser = video_parser()
    given = parser.parse_args(underscored(arguments))
    if given.from_meta is not None:
        return prepare_conversion(given, parser)
    if given.video_folder is None:
        raise ValueError("--video_folder is missing; or give --from_meta, or a config")
    frames, picture = frames_of(given), picture_of(given)
    check_verify(given)
    for name in ("read_ahead", "verify"):
        if getattr(given, name) < 0:
            raise ValueError(f"--{name} {getattr(given, name)} must be 0 or more")
    listing = list_clips(
        given.video_folder,
        form=given.caption_format,
        field=given.caption_field,
        table=given.captions,
        missing=given.missing_caption,
    )
    from opensora_like.preparation import run
    from opensora_like.preparation.sinks import hold_folder

    autoencoder, text_encoder = run.sections_of(
        given.model, autoencoder=given.autoencoder, text_encoder=given.text_encoder
    )
    autoencoder |= {"dtype": given.vae_dtype} if given.vae_dtype else {}
    autoencoder |= {"use_tiling": True} if given.tiling else {}
    text_encoder |= {"max_length": given.max_length, "dtype": given.text_dtype}
    job = run.Job(
        given.video_folder,
        given.output_folder,
        OUTPUTS[given.output_format],
        listing,
        frames,
        picture,
        autoencoder,
        text_encoder,
        given.stochastic,
        given.seed,
        given.latents_dtype,
        given.read_ahead,
        given.verify,
        given.verify_folder,
    )
    runtime, device = start(given.device)
    recipe, fingerprint = run.build_recipe(job, device)
    held = hold_folder(job.output_folder, runtime)
    sink = run.open_sink(job, fingerprint, rank=runtime.rank, world_size=runtime.world_size)

    def work() -> int:
        with held:
            return run.prepare(job, recipe, fingerprint, sink, runtime)

    return work


def start(device: str | None) -> tuple[Runtime, torch.device]:
    """Join the processes of a torchrun. Returns: also the device of the encoders."""
    import torch

    from opensora_like import runtime as rt

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here; use --device cpu")
    runtime = rt.start(timeout_minutes=DAYS)
    rt.set_up_logging(runtime)
    return runtime, torch.device("cpu") if device == "cpu" else runtime.device


def prepare_conversion(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Work:
    """.meta files to a store."""
    about = {"from_meta", "output_folder", "model", "autoencoder", "text_encoder", "vae_dtype", "text_dtype", "tiling"}
    defaults = vars(parser.parse_args(["--output_folder", "."]))
    unused = sorted(n for n, value in vars(given).items() if value != defaults[n] and n not in about)
    if unused:
        raise ValueError(f"--from_meta takes what is in the files; {['--' + n for n in unused]} would do nothing")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--from_meta encodes nothing; run it in one process")
    from opensora_like.preparation import from_meta, run
    from opensora_like.preparation.sinks import hold_folder

    from_meta.meta_files(given.from_meta)
    sections = None
    if any((given.model, given.autoencoder, given.text_encoder)):
        sections = run.sections_of(given.model, autoencoder=given.autoencoder, text_encoder=given.text_encoder)
        sections[0].update({"dtype": given.vae_dtype} if given.vae_dtype else {})
        sections[0].update({"use_tiling": True} if given.tiling else {})
        sections[1].update({"dtype": given.text_dtype})
    made_by, null = from_meta.provenance(given.from_meta, sections)
    held = hold_folder(given.output_folder)

    def work() -> int:
        with held:
            counts = from_meta.convert(given.from_meta, given.output_folder, made_by, null)
        print(f"{given.output_folder}: {counts.made} samples made, {counts.kept} there already, {counts.failed} failed")
        return 0 if counts.made + counts.kept else 1

    return work


def prepare_scan(arguments: list[str]) -> Work:
    """Write meta.json."""
    parser = argparse.ArgumentParser(prog="cache_latents.py scan", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--captions", type=Path, metavar="LIST", help="csv, parquet, json or jsonl of captions")
    parser.add_argument("--caption_format", choices=get_args(Format), default="auto")
    parser.add_argument("--caption_field")
    parser.add_argument("--num_workers", type=int, default=8, help="threads that measure videos; default 8")
    parser.add_argument("--overwrite", action="store_true", help="replace meta.json")
    given = parser.parse_args(underscored(arguments))
    from opensora_like.preparation.scan import check_absent, scan, write_meta_json

    check_absent(given.folder, overwrite=given.overwrite)
    found = scan(
        given.folder,
        form=given.caption_format,
        field=given.caption_field,
        table=given.captions,
        num_workers=given.num_workers,
    )

    def work() -> int:
        for file, reason in found.problems:
            print(f"  {file}: {reason}")
        for note in found.notes:
            print(f"  {note}")
        if not found.entries:
            print(f"{given.folder}: none of {len(found.problems)} videos can be read")
            return 1
        target = write_meta_json(given.folder, found.entries, overwrite=given.overwrite)
        print(f"{target}: {len(found.entries)} clips, {len(found.problems)} videos cannot be read")
        return 0

    return work


def prepare_table(arguments: list[str]) -> Work:
    """Cache what a training config reads and encodes."""
    parser = argparse.ArgumentParser(prog="cache_latents.py CONFIG", allow_abbrev=False)
    parser.add_argument("--out", "--output_folder", "--output-folder", type=Path, required=True, metavar="OUT")
    parser.add_argument("--cache_epochs", "--cache-epochs", type=int, default=1, help="whose clips to cache; default 1")
    parser.add_argument("--cache_batch_size", "--cache-batch-size", type=int, help="default: the plan's micro-batches")
    parser.add_argument("--verify", type=int, default=0, metavar="K")
    parser.add_argument("--verify_folder", "--verify-folder", type=Path)
    given, rest = parser.parse_known_args(arguments[1:])
    check_verify(given)
    from opensora_like.settings import RunConfig

    command = read_command_line([arguments[0], *rest], schema=RunConfig, usage=__doc__ or "")
    if command.is_done:
        return lambda: 0
    from opensora_like import runtime as rt
    from opensora_like.preparation.sinks import hold_folder
    from opensora_like.preparation.table import cache_table

    runtime = rt.start(timeout_minutes=command.config.timeout_minutes)
    rt.set_up_logging(runtime)
    held = hold_folder(given.out, runtime)

    def work() -> int:
        with held:
            made = cache_table(command.config, given.out, epochs=given.cache_epochs, batch_size=given.cache_batch_size)
        if runtime.is_main:
            print(f"{given.out}: {json.dumps(made._asdict())}")
            if given.verify:
                from opensora_like.preparation.verify import report, verify_table

                found = verify_table(command.config, given.out, runtime.device, count=given.verify)
                report(found, folder=given.verify_folder)
        return 0 if made.written + made.skipped else 1

    return work


def prepare(arguments: list[str]) -> Work:
    if not arguments:
        raise ValueError("give --video_folder and --output_folder, or scan FOLDER, or a config; --help tells more")
    if arguments[0] == "scan":
        return prepare_scan(arguments[1:])
    return prepare_videos(arguments) if arguments[0].startswith("-") else prepare_table(arguments)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """So that what is in memory is written."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    code = run_guarded(prepare)
    if "torch" in sys.modules:
        from opensora_like.runtime import finish

        finish()
    sys.exit(code)
