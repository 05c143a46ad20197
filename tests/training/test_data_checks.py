"""Buckets that a run's models cannot take are named before training, and what they take at a cost is told."""

import pytest

from opensora_like.datasets.bucket import compile_buckets
from opensora_like.datasets.cost import Grid
from opensora_like.models.autoencoders.patch import PatchAutoencoder
from opensora_like.training.data_checks import bucket_errors, bucket_notes
from tests.training.harness import build_toy

GRID = Grid(temporal=4, spatial=16)


def _buckets(*frames: int):
    return compile_buckets({"64px": dict.fromkeys(frames, (1.0, 2))}, multiple=16)


def test_lengths_that_an_autoencoder_refuses_are_named_once():
    """One line for each, with its key and the lengths that are allowed; none for lengths of 4k + 1."""
    autoencoder = PatchAutoencoder(8, 4)
    assert bucket_errors(_buckets(1, 5, 9), autoencoder) == []
    errors = bucket_errors(_buckets(1, 6, 8, 9), autoencoder)
    assert [line.split(" ")[0] for line in errors] == ["bucket_config.64px.8", "bucket_config.64px.6"]
    notes = bucket_notes(_buckets(1, 6, 9), autoencoder, GRID, sp_size=1)
    assert notes == ["6 frames are not 4 * k + 1, and the autoencoder is causal: use 5 or 9"]


@pytest.mark.parametrize("sp_size", [1, 2, 4, 5, 64])
def test_tokens_that_ranks_cannot_share_evenly_are_counted(sp_size):
    """Of every bucket, whether its tokens divide; and whether there are fewer of them than ranks."""
    buckets = _buckets(1, 5, 9)
    tokens = [GRID.tokens(shape) for shape in buckets.shapes]
    notes = "\n".join(bucket_notes(buckets, PatchAutoencoder(8, 4), GRID, sp_size=sp_size))
    uneven = {buckets.name(b) + buckets.ratios[b] for b, count in enumerate(tokens) if count % sp_size}
    assert (f"does not divide the image tokens of {len(uneven)} buckets of one ratio" in notes) == bool(uneven)
    assert ("nothing to do" in notes) == (min(tokens) < sp_size)


ABSENT = ["--encoders.text", "{'type': 't5', 'from_pretrained': 'no/such/weights'}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "{'type': 'video_text', 'data_path': 'none.csv'}"], "table 'none.csv' does not exist"),
        (["--dataset", "{'type': 'video_text', 'data_pth': 'none.csv'}"], "data_pth"),
        (["--accumulation-steps", "1000"], "one step takes 1000"),
        (["--bucket-config", "{'8px_ar1:1': {5: (1.0, 0)}}"], "bucket_config"),
        (["--dropout-ratio", "{'txet': 0.1}"], r"dropout_ratio\.txet: there is no such encoder"),
        (["--condition-config", "{'i2v_haed': 1}"], "i2v_haed"),
        (["--scheduler", "{'type': 'flow_matching', 'shift': -1.0}"], "shift=-1.0"),
        (["--pin-memory", "True"], "pin_memory=True needs a GPU"),
        (["--encoders.text.tp", "True"], r"encoders\.text\.tp=True needs tensor parallelism"),
        ([], "no/such/weights"),  # and nothing but that is wrong with the others
    ],
)
def test_data_and_settings_are_looked_at_before_any_encoder_is_built(tmp_path, arguments, message):
    """What a run cannot go on with is said first, though the weights of an encoder are not there either."""
    with pytest.raises((ValueError, OSError), match=message):
        build_toy(tmp_path, *ABSENT, *arguments)
