"""Sampling runs: every file once, whole, and reproducible, whatever is killed, resumed or shared out."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_like import runtime as rt
from opensora_like.conditioning.masks import given_frames
from opensora_like.config import read_config
from opensora_like.datasets.video_io import BadSample, probe, read_frames
from opensora_like.datasets.video_writing import write_image, write_video
from opensora_like.evaluation import sampling
from opensora_like.evaluation.generate import Sampled, VideoGenerator
from opensora_like.evaluation.jobs import plan, record_path, share
from opensora_like.evaluation.outline import check_references
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.evaluation.sampling import build_sampling
from opensora_like.publish import is_draft
from opensora_like.runtime import Runtime
from opensora_like.settings import InferenceConfig
from tests.evaluation.local_server import Answer, LanguageModel, serving
from tests.training.harness import ROOT, train_toy

CONFIG = ROOT / "tests/training/toy_inference.py"
GIVEN = ["--prompt", "a", "--cond-type", "i2v_head", "--ref"]
CSV = 'text,name\na red ball,red\na blue ball,blue\n"a dog, running",dog\na red ball,again\n'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    outputs = tmp_path_factory.mktemp("sampling")
    train_toy(outputs, "--steps", "3")
    return str(outputs / "toy")


def config_of(*arguments: str) -> InferenceConfig:
    return read_config(CONFIG, arguments, schema=InferenceConfig).config


def run(*arguments: str) -> list[Path]:
    """A whole run in this process. Returns: the files that it wrote."""
    return build_sampling(config_of(*arguments), rt.start())()


def names(paths: list[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def write_prompts(folder: Path, text: str = CSV) -> str:
    (folder / "p.csv").write_text(text)
    return str(folder / "p.csv")


def sampled(checkpoint: str, *arguments: str) -> dict[tuple[str, int], torch.Tensor]:
    config = config_of("--ckpt-path", checkpoint, *arguments)
    found: list[Sampled] = list(VideoGenerator(config, torch.device("cpu")).sample(read_prompts(config)))
    return {(s.prompt.name, s.repeat): s.video_CTHW for s in found}


def test_a_sample_does_not_depend_on_the_other_rows(checkpoint: str, tmp_path: Path) -> None:
    """Reordered, cut to a range, or alone: the pixels stay; the second row of one text gets noise of its own."""
    prompts = write_prompts(tmp_path)
    whole = sampled(checkpoint, "--prompts", prompts, "--num-sample", "2", "--batch-size", "3")
    (tmp_path / "turned.csv").write_text('name,text\ndog,"a dog, running"\nblue,a blue ball\nred,a red ball\n')
    turned = sampled(checkpoint, "--prompts", str(tmp_path / "turned.csv"), "--num-sample", "2")
    last = sampled(checkpoint, "--prompts", prompts, "--start-index", "3")
    alone = sampled(checkpoint, "--prompt", "a blue ball")
    for key, video in [*turned.items(), *last.items(), (("blue", 0), alone["prompt_0000", 0])]:
        torch.testing.assert_close(video, whole[key], atol=1e-5, rtol=0)
    assert last.keys() == {("again", 0)} and not torch.equal(whole["again", 0], whole["red", 0])


def test_what_is_there_is_not_made_again(checkpoint: str, tmp_path: Path) -> None:
    """A second start makes the missing file alone, and with nothing missing it does not even load weights."""
    common = ["--ckpt-path", checkpoint, "--prompts", write_prompts(tmp_path), "--save-dir", str(tmp_path / "out")]
    first = run(*common, "--num-sample", "2")
    assert names(first) == sorted(f"{n}{k}.mp4" for n in ("red", "blue", "dog", "again") for k in ("", "_1"))
    pixels = {path: path.read_bytes() for path in first}
    (tmp_path / "out/blue_1.mp4").unlink()
    (tmp_path / "out/.writing-blue_1.mp4").write_bytes(b"half of it")  # what a kill leaves, and is none
    assert names(run(*common, "--num-sample", "2")) == ["blue_1.mp4"]
    assert {path: path.read_bytes() for path in first} == pixels
    assert run(*common, "--num-sample", "2") == [] and names(run(*common, "--num-sample", "3")) == sorted(
        f"{n}_2.mp4" for n in ("red", "blue", "dog", "again")
    )


def test_a_file_of_other_settings_is_not_taken_for_this_one(checkpoint: str, tmp_path: Path) -> None:
    """Another seed, or a file of another program: an error that names both values; --overwrite makes it again."""
    common = ["--ckpt-path", checkpoint, "--prompt", "a cat", "--save-dir", str(tmp_path)]
    (path,) = run(*common)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"prompt_0000.mp4' is there and was made with seed=42, now it is 1 \(1 set"):
        run(*common, "--seed", "1")
    assert run(*common, "--batch-size", "2", "--sp-size", "all") == []  # they change no pixel
    assert run(*common, "--seed", "1", "--overwrite") == [path] and path.read_bytes() != before
    record_path(config_of(*common), plan(config_of(*common, "--overwrite"), rt.start())[0]).unlink()
    path.write_bytes(b"of another program")
    with pytest.raises(ValueError, match="nothing says what it was made from; choose another --save-dir"):
        run(*common, "--seed", "1")


def test_adapters_that_were_trained_on_are_other_ones(checkpoint: str, tmp_path: Path) -> None:
    """A run's folder means its newest checkpoint, for adapters as for weights: a file of an older one is not taken."""
    training = ["--lora_config", "{'r': 2, 'target_modules': ['qkv']}", "--ema_decay", "None"]
    train_toy(tmp_path, *training, "--steps", "1")
    run_folder = str(tmp_path / "toy")
    other = f"dict(boundary=0.5, ckpt_path={checkpoint!r}, lora_checkpoint={run_folder!r})"
    common = ["--ckpt-path", checkpoint, "--prompt", "a cat"]
    asked = {"own": ["--lora-checkpoint", run_folder], "other": ["--other_expert", other]}
    for name, adapters in asked.items():
        common_of = [*common, *adapters, "--save-dir", str(tmp_path / name)]
        assert len(run(*common_of)) == 1 and run(*common_of) == []
    train_toy(tmp_path, *training, "--steps", "2", "--load", "latest")
    for name, adapters in asked.items():
        with pytest.raises(ValueError, match=r"is there and was made with .*global_step1.*, now it is .*global_step2"):
            run(*common, *adapters, "--save-dir", str(tmp_path / name))


def test_what_a_file_was_made_from_stands_beside_it(checkpoint: str, tmp_path: Path) -> None:
    """Caption as text; prompt, seed and every setting that matters as JSON; frames at the asked rate."""
    arguments = ["--ckpt-path", checkpoint, "--prompt", "a cat", "--save-dir", str(tmp_path), "--num-sample", "2"]
    paths = run(*arguments, "--fps-save", "12", "--motion-score", "4")
    assert [probe(path).fps for path in paths] == [12.0, 12.0]
    assert (tmp_path / "prompt_0000_1.txt").read_text() == "a cat 12 FPS, 4 motion score.\n"
    record = json.loads((tmp_path / "prompt_0000_1.json").read_text())
    assert (record["prompt"], record["seed"], record["refined_prompt"]) == ("a cat", 43, None)
    assert record["request"]["num_steps"] == 4 and record["request"]["model"]["hidden_size"] == 32
    assert Path(record["request"]["weights"]).name == "epoch0-global_step3"


def test_a_language_model_rewrites_and_judges(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt is refined and judged once for all its samples, which is recorded; a resumed run asks nothing."""
    model = LanguageModel()
    common = ["--ckpt-path", checkpoint, "--prompts", write_prompts(tmp_path), "--save-dir", str(tmp_path / "out")]
    common += ["--refine-prompt", "True", "--motion-score", "dynamic", "--num-sample", "2"]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        run(*common)
    with serving(model) as url:
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
        run(*common)
        assert len(model.asked) == 8
        (tmp_path / "out/dog_1.mp4").unlink()
        assert names(run(*common)) == ["dog_1.mp4"] and len(model.asked) == 8
        texts = [(tmp_path / f"out/dog{k}.txt").read_text() for k in ("", "_1")]
        assert texts == ["a dog, running, in full 24 FPS, 7 motion score.\n"] * 2
        record = json.loads((tmp_path / "out/dog_1.json").read_text())
        assert (record["prompt"], record["refined_prompt"]) == ("a dog, running", "a dog, running, in full")
    assert record["motion_score"] == 7.0


def first_frame(path: Path) -> torch.Tensor:
    return torch.from_numpy(read_frames(path, [0])[0]).float() / 127.5 - 1


def test_references_of_a_csv(checkpoint: str, tmp_path: Path) -> None:
    """A file beside the csv and an address: each video begins with its own; one that is missing stops the run."""
    grey, white = (np.full((16, 16, 3), level, np.uint8) for level in (90, 230))
    write_image(tmp_path / "grey.png", grey)
    write_image(tmp_path / "white.png", white)
    common = ["--ckpt-path", checkpoint, "--save-dir", str(tmp_path / "out"), "--cond-type", "i2v_head"]
    page = Answer(body=(tmp_path / "white.png").read_bytes(), content_type="image/png")
    with serving(lambda *_: page) as url:
        prompts = write_prompts(tmp_path, f"text,ref\na,grey.png\nb,{url}/white\n")
        paths = run(*common, "--prompts", prompts)
    for path, level in zip(paths, (90, 230), strict=True):
        assert (first_frame(path) - (level / 127.5 - 1)).abs().mean() < 0.05  # what H.264 leaves of it
    with pytest.raises(ValueError, match=r"row 1 \('p_0001'\) has no reference, and cond_type='i2v_head' needs one"):
        run(*common, "--overwrite", "--prompts", write_prompts(tmp_path, "text,ref\na,grey.png\nb,\n"))
    with pytest.raises(ValueError, match=r"ref='gone.png' does not exist"):
        run(*common, "--overwrite", "--prompts", write_prompts(tmp_path, "text,ref\na,gone.png\n"))


def ends_of(cond_type: str, ref: str, checkpoint: str) -> tuple[float, float]:
    """Mean of the first and of the last frame."""
    arguments = ["--prompt", "x", "--cond-type", cond_type, "--ref", ref, "--num-frames", "9"]
    (video,) = sampled(checkpoint, *arguments).values()
    return video[:, 0].mean().item(), video[:, -1].mean().item()


def test_tasks_take_the_right_frames(checkpoint: str, tmp_path: Path) -> None:
    """A video that grows lighter: the head is its first frame, the tail its last one, a loop has both; of two
    references a loop takes the beginning of the first and the end of the last."""
    levels = np.linspace(20, 240, 12).astype(np.uint8)
    write_video(tmp_path / "rise.mp4", np.broadcast_to(levels[:, None, None, None], (12, 16, 16, 3)), 24, crf=0)
    write_image(tmp_path / "grey.png", np.full((16, 16, 3), 128, np.uint8))
    rise, grey = str(tmp_path / "rise.mp4"), str(tmp_path / "grey.png")
    dark, light, middle = (value / 127.5 - 1 for value in (20, 240, 128))
    assert ends_of("i2v_head", rise, checkpoint)[0] == pytest.approx(dark, abs=0.05)
    assert ends_of("i2v_tail", rise, checkpoint)[1] == pytest.approx(light, abs=0.05)
    assert ends_of("i2v_loop", rise, checkpoint) == pytest.approx((dark, light), abs=0.05)
    assert ends_of("i2v_loop", grey, checkpoint) == pytest.approx((middle, middle), abs=0.05)
    assert ends_of("i2v_loop", f"{grey};{rise}", checkpoint) == pytest.approx((middle, light), abs=0.05)


@pytest.mark.parametrize("cond_type", ["v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"])
def test_videos_are_continued(checkpoint: str, tmp_path: Path, cond_type: str) -> None:
    """33 frames, 65 in the easy form, of the end that is given come back; a shorter reference is refused."""
    given = 65 if cond_type.endswith("easy") else 33
    levels = np.linspace(20, 240, given + 5).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (given + 5, 16, 16, 3))
    write_video(tmp_path / "rise.mp4", frames, 24, crf=0)
    common = ["--prompt", "x", "--cond-type", cond_type, "--num-frames", str(given + 4), "--num-steps", "1"]
    (video,) = sampled(checkpoint, *common, "--ref", str(tmp_path / "rise.mp4")).values()
    wanted = torch.from_numpy(levels / 127.5 - 1).float()
    means = video.mean(dim=(0, 2, 3))
    if "head" in cond_type:
        torch.testing.assert_close(means[:given], wanted[:given], atol=0.05, rtol=0)
    else:
        torch.testing.assert_close(means[-given:], wanted[-given:], atol=0.05, rtol=0)
    write_video(tmp_path / "short.mp4", frames[:10], 24)
    with pytest.raises(ValueError, match=f"takes {given} frames of it, it has 10"):
        sampled(checkpoint, *common, "--ref", str(tmp_path / "short.mp4"))


@pytest.mark.parametrize(("cond_type", "is_read"), [("i2v_head", False), ("i2v_tail", True), ("v2v_head", True)])
def test_damaged_frames_that_the_task_takes_are_found_first(tmp_path: Path, cond_type: str, is_read: bool) -> None:
    """A header tells how many frames there are and not whether they are whole; those that are not taken may be torn."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    write_video(tmp_path / "torn.mp4", noise, 24, crf=10)
    data = bytearray((tmp_path / "torn.mp4").read_bytes())
    data[len(data) // 4 : -4096] = b"\xff" * (len(data) - 4096 - len(data) // 4)
    (tmp_path / "torn.mp4").write_bytes(data)
    given = given_frames(cond_type, is_causal=True)
    with pytest.raises(BadSample, match="torn") if is_read else nullcontext():
        check_references([str(tmp_path / "torn.mp4")], given, cond_type=cond_type)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("text\na, b\n", [], r"row 0 \(from 0\) has 1 fields more than the header; put texts with commas in double"),
        ("text\na\n \n", [], r"row 1 \(from 0\) has no text"),
        ("caption\na\n", [], r"no column 'text'; it has \['caption'\]"),
        ("text,name\na,x\nb,x\n", [], "sample 0 of row 0 and sample 0 of row 1 would both write 'x'"),
        ("text,name\na,x\nb,x_1\n", ["--num-sample", "2"], "sample 1 of row 0 and sample 0 of row 1 would both"),
        ("text,name\na,../x\n", [], "has the name '../x', which is no file name"),
        ("text\na\n", ["--start-index", "1"], r"has rows 0 to 0; give 0 <= start_index < end_index <= 1"),
        ("text\na\n", ["--ref", "x.png", "--cond-type", "i2v_head"], "ref='x.png' belongs to --prompt"),
        (None, ["--prompt", "a", "--end-index", "1"], "count rows of --prompts, and --prompt is given"),
        (None, ["--prompt", "a", "--ref", "x.png"], "ref='x.png' is not used with cond_type='t2v'"),
        (None, ["--prompt", "a", "--num-sample", "0"], "num_sample=0 must be 1 or more"),
        (None, ["--prompt", "a", "--sp-size", "2"], r"sp_size=2 does not divide the 1 processes"),
        (None, ["--prompt", "a", "--motion-score", "some"], "--motion-score='some' does not fit .*dynamic"),
        (None, ["--prompt", "a", "--first-image.num-steps", "2"], "first_image=.*needs a 'type'"),
        (None, ["--prompt", " "], "prompt=' ' has no text"),
        ("", [], r"no column 'text'; it has \[\]"),
        ("text\n", [], "has no row below its header"),
        (None, ["--prompt", "a", "--num-frames", "6", "--autoencoder.temporal-stride", "4"], "num_frames=6 is not"),
        (None, ["--prompt", "a", "--width", "17"], "width=17 must be a multiple of 2"),
        (None, ["--prompt", "a", "--resolution", "64px"], "height=16.*--resolution none takes back"),
        (None, ["--prompt", "a", "--cond-type", "i2v_haed"], r"cond_type='i2v_haed': unknown task; did you mean \["),
        (None, [*GIVEN, "{folder}/junk.png"], "junk.png': not a readable image"),
        (None, [*GIVEN, "{folder}/junk.mp4"], "junk.mp4': not a video, cut off or damaged"),
        (None, [*GIVEN, "{folder}/ok.png", "--num-frames", "1"], "is given 1 frames, none is left to make; raise num"),
        (None, [*GIVEN, "{folder}/ok.png", "--cond-type", "v2v_head"], "num_frames=5: .*is given 33 frames"),
        (None, [*GIVEN, "{folder}/ok.png", "--cond-type", "v2v_head", "--num-frames", "37"], "takes 33 .*it has 1$"),
        (None, [*GIVEN, "{folder}/ok.png", "--model.cond-embed", "False"], "needs a model with cond_embed=True"),
        (None, ["--prompt", "a", "--sampler", "few_step"], "needs few_step_times"),
        (None, ["--prompt", "a", "--audio-guidance", "2.0"], "audio_guidance=2.0: the denoiser hears nothing"),
        (None, ["--prompt", "a", "--lora-checkpoint", "{folder}/gone"], "gone' does not exist"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str | None,
    arguments: list[str],
    message: str,
) -> None:
    """A csv that contradicts itself, settings that would not be used or do not fit, references that cannot be read."""
    for name in ("junk.png", "junk.mp4"):
        (tmp_path / name).write_text("neither image nor video")
    write_image(tmp_path / "ok.png", np.zeros((16, 16, 3), np.uint8))
    given = ["--prompts", write_prompts(tmp_path, text)] if text is not None else []
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    for name in ("build_frozen", "VideoGenerator"):  # whatever would load weights fails with another error
        monkeypatch.setattr(sampling, name, None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("--ckpt-path", checkpoint, "--save-dir", str(tmp_path / "out"), *given, *arguments)
    assert not list(tmp_path.glob("out/*.mp4"))


def test_a_folder_that_cannot_be_written_is_told_to_all(checkpoint: str, tmp_path: Path) -> None:
    """Rank 0 finds out while the others wait for its plan."""
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"out"):
        run("--ckpt-path", checkpoint, "--save-dir", str(tmp_path / "out"), "--prompt", "a")


def test_columns_that_are_not_used_are_told(checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A table may have more columns; that they do nothing is said. A byte order mark is none of the first one."""
    (tmp_path / "p.csv").write_text('text,height,loop\n"a ""b"", c",64,1\n', encoding="utf-8-sig")
    (prompt,) = read_prompts(config_of("--ckpt-path", checkpoint, "--prompts", str(tmp_path / "p.csv")))
    assert prompt.text == 'a "b", c' and "columns ['height', 'loop'] are not used" in caplog.text


def test_a_model_trained_without_given_frames(tmp_path: Path) -> None:
    """Where the config could give frames, it samples from text as its own config does, and refuses to be given any."""
    train_toy(tmp_path, "--steps", "1", "--model.cond-embed", "False", "--condition-config", "none")
    own, other = (
        sampled(str(tmp_path / "toy"), "--prompt", "a cat", "--model.cond-embed", value)["prompt_0000", 0]
        for value in ("False", "True")
    )
    torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
    write_image(tmp_path / "ref.png", np.zeros((16, 16, 3), np.uint8))
    given = ["--cond-type", "i2v_head", "--ref", str(tmp_path / "ref.png")]
    with pytest.raises(ValueError, match=r"trained without given frames .*cond_in.*use --cond-type t2v --first-image"):
        sampled(str(tmp_path / "toy"), "--prompt", "a cat", *given)


def test_shares_hold_every_job_once() -> None:
    """On any number of processes; those that share videos have the same jobs."""
    for world, sp_size in ((1, 1), (3, 1), (8, 2), (4, 4)):
        ranks = [Runtime(r, world, r, torch.device("cpu")) for r in range(world)]
        shares = [share(range(7), rank, sp_size=sp_size) for rank in ranks]
        assert sorted(itertools.chain(*shares[::sp_size])) == list(range(7))
        assert all(shares[r] == shares[r // sp_size * sp_size] for r in range(world))


def test_a_kill_leaves_whole_files_alone(checkpoint: str, tmp_path: Path) -> None:
    """Killed in the middle of a csv, a run leaves files that are whole; the next start makes the others."""
    rows = "".join(f"clip {i},c{i:02d}\n" for i in range(16))
    out = tmp_path / "out"
    common = ["--ckpt-path", checkpoint, "--prompts", write_prompts(tmp_path, f"text,name\n{rows}")]
    common += ["--save-dir", str(out), "--num-frames", "33", "--num-steps", "8"]
    command = [sys.executable, str(ROOT / "scripts/diffusion/inference.py"), str(CONFIG), *common]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(list(out.glob("c*.mp4"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = sorted(out.glob("c*.mp4"))
    assert 3 <= len(made) < 16
    assert all(probe(path).num_frames == 33 for path in made)
    rest = run(*common)
    assert len(rest) == 16 - len(made) and not set(rest) & set(made)
    assert len([file for file in out.glob("*.mp4") if not is_draft(file)]) == 16


def test_two_commands_may_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One comes and goes while the other is writing: both end, and what is there is whole."""
    cfg = config_of("--prompt", "a", "--save-dir", str(tmp_path), "--num-frames", "1")
    sample = Sampled(read_prompts(cfg)[0], 0, "a", torch.zeros(3, 1, 32, 32))

    def write_while_another_does(path: Path, frame: np.ndarray) -> None:
        write_image(path, frame)
        monkeypatch.setattr(sampling, "write_image", write_image)
        sampling.write_sampled(cfg, sample)

    monkeypatch.setattr(sampling, "write_image", write_while_another_does)
    path = sampling.write_sampled(cfg, sample)
    assert read_frames(str(path), [0]).shape == (1, 32, 32, 3)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".png", ".txt"]
