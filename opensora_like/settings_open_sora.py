"""Settings of Open-Sora v2 that have another name here or none, for the error and the documentation that say so."""

from __future__ import annotations

ALL_RANKS = "remove it: all ranks compute the plan of an epoch by themselves, in seconds"
AUTOENCODER_SAYS = "remove it: the autoencoder says it itself"
MASTERS = "remove it: float32 masters are in every checkpoint, and loaded with it"
METRICS = "remove it: metrics.jsonl has the times, and torch's or NVIDIA's profiler can be put around the command"
NO_PLUGIN = "use sp_size: sampling shares a video's tokens among processes; linears and the autoencoder are not cut"
STEP_SAYS = "remove it: the learning rate is a function of the step, and nothing about it is restored"

BOTH = {
    "ae": "use autoencoder",
    "t5": "use encoders.text",
    "clip": "use encoders.pooled",
    "is_causal_vae": AUTOENCODER_SAYS,
    "ae_spatial_compression": AUTOENCODER_SAYS,
    "patch_size": "use model.patch_size",
}
TRAINING = BOTH | {
    "batch_size": "use the batch sizes in bucket_config, or local_batch_size",
    "cached_video": "use dataset.type='latents' (docs/caching.md)",
    "cached_text": "use dataset.type='latents' (docs/caching.md)",
    "grad_checkpoint": "use model.grad_ckpt_settings: (100, 100) recomputes every block, False none",
    "initial_lr": STEP_SAYS,
    "load_master_weights": MASTERS,
    "nsys": METRICS,
    "nsys_num_steps": METRICS,
    "nsys_warmup_steps": METRICS,
    "num_bucket_build_workers": ALL_RANKS,
    "optim.adamw_mode": "use optim.type: AdamW and HybridAdam both decay weights as AdamW does",
    "optim.cls": "use optim.type",
    "pin_memory_cache_pre_alloc_numels": "remove it: pin_memory keeps its pages for reuse, however many are needed",
    "record_barrier": METRICS,
    "record_time": METRICS,
    "save_master_weights": MASTERS,
    "sigma_min": "use scheduler.sigma_min",
    "update_warmup_steps": STEP_SAYS,
    "use_cosine_scheduler": "use lr_schedule='cosine'",
    "warmup_ae": "remove it: nothing has to be warmed up",
}
SAMPLING = BOTH | {
    "dataset": "use prompts",
    "img_flux": "use first_image, which takes the folder of a FluxPipeline",
    "img_flux_ae": "use first_image, which takes the folder of a FluxPipeline",
    "img_resolution": "use first_image.resolution",
    "num_samples": "use start_index and end_index for rows, num_sample for samples of each",
    "num_workers": "remove it: prompts need no loader",
    "plugin": NO_PLUGIN,
    "plugin_ae": NO_PLUGIN,
    "plugin_config": NO_PLUGIN,
    "plugin_config_ae": NO_PLUGIN,
    "prefetch_factor": "remove it: prompts need no loader",
    "pretrained_lora_path": "use lora_checkpoint",
    "prompt_as_path": "use the column 'name' of prompts",
    "sampling_option.is_causal_vae": AUTOENCODER_SAYS,
    "sampling_option.method": "remove it: cond_type decides which branches of guidance there are",
    "sampling_option.shift": "use scheduler.shift: 'resolution' is the published one, None shifts nothing",
    "sampling_option.temporal_reduction": AUTOENCODER_SAYS,
    "sampling_option": "leave out 'sampling_option.': its settings stand at the top",
    "save_prefix": "use save_dir, or the column 'name' of prompts",
    "use_t2i2v": "use the config t2i2v_256px.py, or --first-image none --cond-type t2v to turn it off",
}


def advice(path: str, *, is_training: bool) -> str | None:
    """What to do about a setting of Open-Sora v2 that is not one here; None if it never was one there.

    Args:
        path: dotted, with ``_``; a part of a section that is known stands for the section.
    """
    table = TRAINING if is_training else SAMPLING
    segments = path.split(".")
    longest_first = (".".join(segments[:n]) for n in range(len(segments), 0, -1))
    return next((f"{name!r} is Open-Sora v2's: {table[name]}" for name in longest_first if name in table), None)
