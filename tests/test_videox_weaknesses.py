"""Known weaknesses of VideoX-Fun's trainers, and the tests that would fail if this program had them.

1 lengths are drawn in frames and cut in latent frames, 2 frames above the token budget, 3 clipping that ZeRO and
FSDP do not do, 4 the critic's rate, times and negative prompt, 5 two experts in distillation and its sampler, 6 the
boundary without uniform sampling, 7 adapters without alpha, targets that match too much, 8 resuming adapters, 9
published files of added weights, 10 HunyuanVideo's first frame, images and batches, 11 the small model's given
frame and sizes, 12 variance of Wan's latents, half-precision times and masters, 13 sound: padding, crops, dropout,
batches, 14 sizes of the batch sampler, 15 randomness of workers and resumed runs, 16 one script per model, 17
ignored flags, 18 pickles, 19 swallowed errors and endless retries, 20 nothing is encoded once, 21 no tests on a
CPU, 22 ranks of unequal work, races between them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GUARDED: dict[int, tuple[str, ...]] = {
    1: ("datasets/test_video_text.py::test_a_sample_has_evenly_spaced_frames_and_its_text",),
    2: ("datasets/test_token_budget.py::test_against_the_published_code",),
    3: (
        "training/test_trainable.py::test_two_processes_train_as_one_does",
        "boosters/test_fsdp2.py::test_trains_as_one_process",
    ),
    4: (
        "training/test_distill.py::test_the_critic_has_its_own_rate",
        "training/test_distill.py::test_the_published_recipe",
    ),
    5: (
        "training/test_distill.py::test_the_low_expert_goes_on_from_the_high_one",
        "training/test_distill.py::test_experts_share_the_steps",
        "schedulers/test_few_step.py::test_a_walk_in_two_parts_is_the_walk",
    ),
    6: (
        "models/test_wan_2_2.py::test_shares_of_the_experts_are_the_published_ones",
        "models/test_wan_2_2.py::test_shipped_configs_cover_all_times_once",
    ),
    7: (
        "checkpoint/test_lora_files.py::test_merged_equals_the_trained_forward",
        "checkpoint/test_lora_files.py::test_names_and_shapes_are_the_published_ones",
        "training/test_hunyuan_video.py::test_adapters_find_their_linears",
    ),
    8: ("training/test_lora.py::test_killed_and_resumed_equals_uninterrupted",),
    9: ("models/test_fantasy_talking.py::test_published_files_are_read",),
    10: (
        "training/test_hunyuan_video.py::test_the_first_frame_is_in_the_loss_unless_it_is_given",
        "models/test_hunyuan_video.py::test_a_mask_is_used_only_where_captions_differ",
        "evaluation/test_hunyuan_pipeline.py::test_image_to_video_is_that_of_the_pipeline",
    ),
    11: (
        "training/test_token_replace.py::test_given_frames_are_out_of_the_loss",
        "models/test_wan_vae_2_2.py::test_sizes",
    ),
    12: (
        "models/test_wan_vae.py::test_sample_is_drawn_before_it_is_normed",
        "training/test_lora.py::test_two_processes_train_as_one_does",
    ),
    13: (
        "models/test_fantasy_talking.py::test_recorded_attention",
        "datasets/test_video_speech.py::test_sound_belongs_to_its_frames",
        "training/test_speech.py::test_sound_is_dropped_by_sample",
        "training/test_speech.py::test_a_batch_is_heard",
    ),
    14: ("datasets/test_bucket.py::test_whole_columns_get_what_single_rows_get",),
    15: (
        "datasets/test_elastic_order.py::test_workers_and_prefetching_change_nothing",
        "training/test_trainable.py::test_killed_and_resumed_equals_uninterrupted",
    ),
    16: ("test_layers.py::test_imports_point_down",),
    17: (
        "test_config.py::test_a_typo_in_any_key_is_an_error_that_names_the_key",
        "test_videox_flags.py::test_every_flag_stands_in_the_table",
    ),
    18: ("models/test_fantasy_talking.py::test_published_files_are_read",),
    19: (
        "datasets/test_loader.py::test_bad_samples_are_written_and_limited",
        "test_layers.py::test_no_site_paths_and_no_bare_except",
    ),
    20: ("training/test_cached_training.py::test_cached_training_is_training_from_videos",),
    21: ("training/test_hunyuan_video.py::test_two_processes_train_and_resume",),
    22: (
        "datasets/test_cost.py::test_ranks_are_busy_on_the_published_buckets",
        "checkpoint/test_crash.py::test_what_is_visible_is_whole",
    ),
}


@pytest.mark.parametrize("number", sorted(GUARDED))
def test_each_weakness_has_its_tests(number: int) -> None:
    """They are there under these names."""
    for place in GUARDED[number]:
        file, _, name = place.partition("::")
        found = {n.name for n in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(n, ast.FunctionDef)}
        assert name in found, place
    assert list(GUARDED) == list(range(1, 23))
