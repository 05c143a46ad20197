"""The loop: a run that was killed and resumed is the run that was not, bit for bit; and it stops where it must."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import signal
from pathlib import Path

import pytest
import torch

from opensora_like.checkpoint import layout
from opensora_like.datasets.batch import Batch
from opensora_like.datasets.plan import steps_in_epoch
from opensora_like.training.optim import Rates
from opensora_like.training.trainer import Meter
from tests.training.harness import Killed, assert_same, build_toy, metrics_of, train_toy

STEPS = 17  # an epoch of the toy data has 14 to 18 micro-batches


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """The uninterrupted run."""
    outputs = tmp_path_factory.mktemp("whole")
    return train_toy(outputs, "--steps", str(STEPS)), outputs / "toy"


def resume(outputs: Path, kills: list[int], *arguments: str):
    """Train with a kill before each of these updates, then to the end."""
    load: list[str] = []
    for kill in kills:
        train_toy(outputs, "--steps", str(STEPS), "--ckpt-every", "1", *arguments, *load, kill_before=kill)
        load = ["--load", "latest"]
    return train_toy(outputs, "--steps", str(STEPS), "--ckpt-every", "1", *arguments, *load)


@pytest.mark.parametrize(
    "kills", [[2], [5, 9], [3, 4, 5], [14, 15, 16, 17], [STEPS]], ids=lambda kills: "-".join(map(str, kills))
)
def test_killed_and_resumed_equals_uninterrupted(whole, kills: list[int], tmp_path: Path) -> None:
    """Weights, moments, EMA, position and the metrics of all steps, with several resumes in an epoch and at its end."""
    run, folder = whole
    assert_same(resume(tmp_path, kills), run)
    assert metrics_of(tmp_path / "toy") == metrics_of(folder)


def test_saving_in_the_background_changes_nothing(whole, tmp_path: Path) -> None:
    """async_io: the same run, and checkpoints that hold the step they are named after."""
    run, _ = whole
    assert_same(resume(tmp_path, [4, 8], "--async-io"), run)


def test_a_kill_between_checkpoints_repeats_the_steps_between(whole, tmp_path: Path) -> None:
    """With a checkpoint every 4 steps, a kill at 7 goes back to 4 and comes out the same."""
    run, folder = whole
    train_toy(tmp_path, "--steps", str(STEPS), "--ckpt-every", "4", kill_before=7)
    again = train_toy(tmp_path, "--steps", str(STEPS), "--ckpt-every", "4", "--load", "latest")
    assert_same(again, run)
    assert metrics_of(tmp_path / "toy") == metrics_of(folder)


def test_the_run_spans_epochs(whole) -> None:
    """What the tests above cover includes the end of an epoch."""
    run, folder = whole
    assert run.state.epoch >= 1 and {row[0] for row in metrics_of(folder, "epoch")} == {0, 1}


def test_loading_for_other_data_keeps_optimizer_and_step(tmp_path: Path) -> None:
    """--start-step 0 --start-epoch 0 restarts the data only; without a checkpoint it is an error."""
    first = train_toy(tmp_path, "--steps", "3")
    other = build_toy(
        tmp_path, "--load", "latest", "--start-step", "0", "--start-epoch", "0", "--dataset.num_clips", "50"
    )
    assert (other.state.step, other.state.epoch, other.state.micro_batch) == (3, 0, 0)
    other.state.micro_batch = first.state.micro_batch
    assert_same(other, first)
    other.lock.close()
    with pytest.raises(ValueError, match="give --load as well"):
        build_toy(tmp_path / "new", "--start-step", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset.num_clips", "41"], "table: 40 rows .* -> 41 rows"),
        (["--bucket_config.8px_ar1:1.5", "(1.0,1)"], "bucket_config.8px_ar1:1.5: .*batch size 2 -> .*batch size 1"),
        (["--seed", "1"], "seed: 42 -> 1"),
        (["--model.depth", "2"], "another model: .* missing"),
        (["--optim.type", "SGD", "--optim.momentum", "0.9"], "no optimizer state"),
    ],
)
def test_resuming_something_else_is_an_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    """What changed since the checkpoint is named, with both values."""
    train_toy(tmp_path, "--steps", "2")
    with pytest.raises(ValueError, match=message):
        build_toy(tmp_path, "--load", "latest", *arguments)


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    """A second run in a folder in use, or a new one over old checkpoints, is refused and told what to do."""
    running = build_toy(tmp_path)
    with pytest.raises(ValueError, match="another run is training"):
        build_toy(tmp_path)
    running.lock.close()
    train_toy(tmp_path, "--steps", "1")
    with pytest.raises(ValueError, match="--load latest"):
        build_toy(tmp_path)
    with pytest.raises(ValueError, match="exp-name"):
        build_toy(tmp_path, "--load", "latest", "--exp-name", "none")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Rank 0 finds out, and tells those that wait for it."""
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match=r"outputs='.*/taken' cannot be written: .*choose another --outputs"):
        build_toy(tmp_path / "taken")


def test_a_file_system_without_locks_is_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre's where it is mounted without them; nothing of the folder was in use."""

    def none_here(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none_here)
    train_toy(tmp_path, "--steps", "1")
    assert layout.complete_checkpoints(tmp_path / "toy")


def test_a_loss_that_is_not_finite_stops_before_any_harm(tmp_path: Path) -> None:
    """The error names step and samples; weights are those of the step before; nothing was saved after it."""
    healthy = train_toy(tmp_path / "a", "--steps", "40", "--ckpt-every", "1", "--exp-name", "x")
    run = build_toy(tmp_path / "b", "--steps", "40", "--ckpt-every", "1", "--dataset.poison", "7")
    before: dict[str, torch.Tensor] = {}

    def remember(batch: Batch) -> None:
        before.update({n: t.clone() for n, t in run.booster.master_shards()})

    run.on_batch = remember
    from opensora_like.training.trainer import train

    with pytest.raises(FloatingPointError, match=r"grad_norm is nan at step \d+; .*7\.mp4"):
        train(run)
    assert all(torch.equal(t, before[n]) for n, t in run.booster.master_shards())
    saved = layout.complete_checkpoints(tmp_path / "b" / "toy")
    assert layout.step_of(saved[-1]) == run.state.step < healthy.state.step


def test_an_infinite_loss_with_a_finite_gradient_stops_as_well(tmp_path: Path) -> None:
    """Squares overflow before their gradients do."""
    run = build_toy(tmp_path, "--steps", "3", "--ckpt-every", "0")
    inner = run.step_fn

    def overflowing(batch: Batch) -> torch.Tensor:
        loss = inner(batch)
        return loss + torch.tensor(float("inf")) if run.state.step == 1 else loss

    run.step_fn = overflowing
    from opensora_like.training.trainer import train

    with pytest.raises(FloatingPointError, match=r"grad_norm is nan at step 2; .*\.mp4"):
        train(run)
    assert run.state.step == 1


def test_sigterm_saves_and_ends(tmp_path: Path) -> None:
    """A signal ends the run after the step in hand, with a checkpoint from which the same run goes on."""
    handler = signal.getsignal(signal.SIGTERM)
    run = build_toy(tmp_path, "--steps", "9")
    steps = itertools.count()
    run.on_batch = lambda batch: signal.raise_signal(signal.SIGTERM) if next(steps) == 3 else None
    from opensora_like.training.trainer import train

    assert train(run) is False
    assert run.state.step == 4
    assert [layout.step_of(f) for f in layout.complete_checkpoints(tmp_path / "toy")] == [4]
    assert signal.getsignal(signal.SIGTERM) == handler
    again = train_toy(tmp_path, "--steps", "9", "--load", "latest")
    assert_same(again, train_toy(tmp_path / "whole", "--steps", "9"))


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    """keep_n_latest counts after each save, and the last step is always saved."""
    train_toy(tmp_path, "--steps", "7", "--ckpt-every", "2", "--keep-n-latest", "2")
    assert [layout.step_of(f) for f in layout.complete_checkpoints(tmp_path / "toy")] == [6, 7]


def test_a_damaged_newest_checkpoint_is_passed_over(whole, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped bit or a cut file: `latest` says so and takes the one before; asked for by name, it is an error."""
    run, _ = whole
    train_toy(tmp_path, "--steps", str(STEPS), "--ckpt-every", "2", kill_before=8)
    newest = layout.complete_checkpoints(tmp_path / "toy")[-1]
    file = newest / "master.rank00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match=r"master\.rank00000\.safetensors' has checksum"):
        build_toy(tmp_path, "--load", str(newest))
    file.write_bytes(data[:-1])
    with pytest.raises(OSError, match=r"bytes, .* were written"):
        build_toy(tmp_path, "--load", str(newest))
    again = train_toy(tmp_path, "--steps", str(STEPS), "--ckpt-every", "2", "--load", "latest")
    assert_same(again, run)
    assert "passes over epoch0-global_step6" in (tmp_path / "toy/log.txt").read_text()


def test_a_damaged_checkpoint_is_not_kept_in_place_of_good_ones(tmp_path: Path) -> None:
    """Of update 4, damaged, and 3, made after a resume from 2, retention keeps the latter, and `latest` loads."""
    train_toy(tmp_path, "--steps", "9", "--ckpt-every", "2", kill_before=5)
    damaged = layout.complete_checkpoints(tmp_path / "toy")[-1] / "master.rank00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    go_on = ["--steps", "9", "--ckpt-every", "1", "--keep-n-latest", "1", "--load", "latest"]
    train_toy(tmp_path, *go_on, kill_before=4)
    assert [layout.step_of(f) for f in layout.complete_checkpoints(tmp_path / "toy")] == [3]
    assert train_toy(tmp_path, *go_on, kill_before=5).state.step == 4


def test_accumulation_and_epochs(tmp_path: Path) -> None:
    """`epochs` ends after that many passes; two micro-batches a step see the same samples in half the steps."""
    one = train_toy(tmp_path / "1", "--epochs", "1")
    two = train_toy(tmp_path / "2", "--epochs", "1", "--accumulation-steps", "2")
    assert one.state.epoch == two.state.epoch == 1
    assert two.state.step == one.state.step // 2
    state = json.loads(next((tmp_path / "2").rglob("state.json")).read_text())
    assert state["samples"] == two.state.samples


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_epochs_end_when_they_do_after_steps_of_another_size(tmp_path: Path, before: int, after: int) -> None:
    """Three of four epochs in steps of one size, the rest in another, as with other processes: four are seen, and the
    learning rate falls over what is left."""
    arguments = ["--bucket-config", "{'8px_ar1:1': {1: (1.0, 3), 5: (1.0, 2)}}", "--epochs", "4", "--ckpt-every", "1"]
    arguments += ["--lr-schedule", "linear", "--warmup-steps", "0"]
    sizes = [["--accumulation-steps", str(size)] for size in (before, after)]
    whole = build_toy(tmp_path, *arguments, *sizes[0])
    whole.lock.close()
    per_epoch = whole.schedule.total_steps // 4
    train_toy(tmp_path, *arguments, *sizes[0], kill_before=3 * per_epoch + 1)
    end = train_toy(tmp_path, *arguments, *sizes[1], "--load", "latest")
    assert (end.state.epoch, end.state.micro_batch) == (4, 0)
    assert end.state.step == end.schedule.total_steps == 3 * per_epoch + per_epoch * before // after
    assert 0 < metrics_of(tmp_path / "toy", "lr")[-1][0] < 1e-2 / (3 * per_epoch)


def test_a_rest_that_fills_no_step_is_no_epoch(tmp_path: Path) -> None:
    """One micro-batch before the end of the last epoch, steps begin to take two: nothing of the next one is seen."""
    last = len(build_toy(tmp_path / "x", "--epochs", "1").plan_of(0)) - 1
    train_toy(tmp_path, "--epochs", "1", "--ckpt-every", "1", kill_before=last + 1)
    end = train_toy(tmp_path, "--epochs", "1", "--accumulation-steps", "2", "--load", "latest")
    assert (end.state.step, end.state.epoch, end.state.micro_batch) == (last, 1, 0)


def test_the_bar_ends_where_the_epoch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs differ in length, so a run of two shows the steps of the one it is in, also after a resume in it."""
    shown: list[tuple[int, int]] = []
    inner = Meter.after_step

    def after_step(meter: Meter, *seen) -> None:
        inner(meter, *seen)
        shown.append((meter._run.state.epoch, meter._bar.total))

    monkeypatch.setattr(Meter, "after_step", after_step)
    run = build_toy(tmp_path, "--epochs", "2", "--ckpt-every", "1")
    first, second = (steps_in_epoch(len(run.plan_of(epoch)), 1) for epoch in (0, 1))
    run.lock.close()
    train_toy(tmp_path, "--epochs", "2", "--ckpt-every", "1", kill_before=5)
    train_toy(tmp_path, "--epochs", "2", "--ckpt-every", "1", "--load", "latest")
    both = first + second
    assert first != second and shown == [(0, first)] * (first - 1) + [(1, both)] * second + [(2, both)]


def test_learning_rate_is_a_function_of_the_step(tmp_path: Path) -> None:
    """Linear warm-up to 1, then constant or a cosine to 0; it reaches the optimizer, also another after a resume."""
    factors = [Rates(lr=0.5, schedule="cosine", warmup_steps=4, decay_steps=20).lr_factor(s) for s in range(21)]
    assert factors[:4] == [0.2, 0.4, 0.6, 0.8] and factors[4] == 1.0 and factors[20] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert Rates(lr=0.5, warmup_steps=4).lr_factor(10**6) == 1.0
    train_toy(tmp_path, "--steps", "5", "--lr", "0.5")
    assert metrics_of(tmp_path / "toy", "lr")[-1] == (0.5,)
    train_toy(tmp_path, "--steps", "6", "--lr", "0.25", "--load", "latest")
    assert metrics_of(tmp_path / "toy", "lr")[-1] == (0.25,)


def test_killed_is_not_swallowed(tmp_path: Path) -> None:
    """The harness's kill really ends the run."""
    run = build_toy(tmp_path)

    def kill(batch: Batch) -> None:
        raise Killed

    run.on_batch = kill
    from opensora_like.training.trainer import train

    with pytest.raises(Killed):
        train(run)


@pytest.mark.parametrize("mode", ["per_sample", "per_token"])
def test_loss_weights_make_the_step_a_mean_over_samples_or_tokens(tmp_path: Path, mode: str) -> None:
    """With two micro-batches of unequal size in a step, the weights are in proportion to size and of mean 1."""
    run = build_toy(tmp_path, "--steps", "6", "--accumulation-steps", "2", "--loss-weight", mode)
    seen: list[Batch] = []
    inner = run.weights_of
    weights: list[list[float]] = []
    run.on_batch = seen.append
    run.weights_of = lambda first: weights.append(inner(first)) or weights[-1]
    from opensora_like.training.trainer import train

    losses: list[torch.Tensor] = []
    step_fn = run.step_fn
    run.step_fn = lambda batch: losses.append(step_fn(batch)) or losses[-1]
    train(run)
    logged = [loss for (loss,) in metrics_of(tmp_path / "toy", "loss")]
    for step, pair in enumerate(weights):
        mean = sum(w * loss.item() for w, loss in zip(pair, losses[2 * step : 2 * step + 2], strict=True)) / 2
        assert logged[step] == pytest.approx(mean), "what is logged is what is trained on"
        sizes = [len(b) * (b.shape.num_frames if mode == "per_token" else 1) for b in seen[2 * step : 2 * step + 2]]
        assert pair == pytest.approx([2 * size / sum(sizes) for size in sizes])
    assert any(pair[0] != pair[1] for pair in weights)
