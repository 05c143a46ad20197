"""What a run can be told: the fields of a config, their types, defaults and meaning."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from mmengine.registry import Registry

from opensora_like.registry import BOOSTERS, DATASETS, MODELS, SCHEDULERS

KeyPath = tuple[str, ...]


def setting(default: Any = MISSING, *, doc: str) -> Any:
    """A field of a config with its line of documentation; a dict or list default is copied per config."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Optim:
    """The optimizer; `betas` and `eps` are Adam's, `momentum` is SGD's."""

    type: Literal["AdamW", "SGD", "HybridAdam"] = "AdamW"
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0


@dataclass(frozen=True)
class RunConfig:
    """A training run. Every top-level name of a training config is a field here."""

    model: dict = setting(doc="denoiser: `type` in MODELS and its arguments")
    autoencoder: dict = setting(doc="pixels to latents: `type` in MODELS and its arguments")
    encoders: dict[str, dict] = setting(doc="condition name -> text encoder (`type` in MODELS and its arguments)")
    dataset: dict = setting(doc="`type` in DATASETS and its arguments; `data_path` is the table")
    bucket_config: dict[str, dict] = setting(
        doc="resolution -> {frames: (keep probability, batch size)}; probability: p or (p_resolution, p_skip_frames)"
    )
    scheduler: dict = setting({"type": "flow_matching"}, doc="`type` in SCHEDULERS and its arguments")
    booster: dict = setting({"type": "colossalai", "plugin": "zero2"}, doc="`type` in BOOSTERS and its arguments")
    optim: dict = setting(
        {"type": "AdamW"}, doc="`type` (AdamW, SGD, HybridAdam), lr, betas, eps, weight_decay, momentum"
    )
    condition_config: dict[str, float] | None = setting(
        None, doc="task -> relative frequency (t2v, i2v_head, i2v_tail, i2v_loop, v2v_*); None trains t2v only"
    )
    no_i2v_ref_loss: bool = setting(False, doc="leave the given frames out of the loss")
    loss_weight: Literal["per_micro_batch", "per_sample", "per_token"] = setting(
        "per_micro_batch", doc="what counts the same in a step's loss: each micro-batch, sample or latent token"
    )
    dropout_ratio: dict[str, float] = setting({}, doc="condition name -> probability of the null embedding, per sample")
    guidance: float = setting(4.0, doc="constant given to models with a guidance embedding")
    sample_posterior: bool = setting(True, doc="draw latents from the autoencoder's posterior; False takes its mean")

    dtype: Literal["bf16", "fp32"] = setting("bf16", doc="dtype of the working weights; masters are float32")
    seed: int = setting(42, doc="of every random draw of the run")
    balance: dict[str, int] | None = setting(
        None,
        doc="let the ranks of a step cost the same: `window` (4096) micro-batches are sorted by cost and cut into "
        "runs of `group` (64), in random order; the micro-batches of a step should divide `group`. None: random order",
    )
    cost: dict[str, float] | None = setting(
        None,
        doc="of a micro-batch, for `balance`: per_token, per_token_pair, per_sample, per_pixel, per_micro_batch, as "
        "tools/plan.py --calibrate prints it; None counts the operations of model, autoencoder and encoders",
    )
    steps: int | None = setting(None, doc="optimizer updates in all; None trains `epochs`")
    epochs: int = setting(1000, doc="passes over the table, where `steps` is None")
    accumulation_steps: int = setting(1, doc="micro-batches per rank and update")
    grad_ckpt_buffer_size: int = setting(
        0,
        doc="bytes of pinned host memory per rank that hold, between forward and backward, what the backward needs "
        "(the blocks' inputs, with grad_ckpt_settings); what does not fit stays on the device. 0 is off",
    )
    grad_clip: float = setting(1.0, doc="largest global L2 norm of the gradients; 0 does not clip")
    warmup_steps: int = setting(0, doc="updates over which lr rises linearly from 0")
    lr_schedule: Literal["constant", "cosine"] = setting("constant", doc="after the warm-up; cosine falls to 0")
    ema_decay: float | None = setting(
        None, doc="decay of the float32 moving average of the weights, reached by warm-up; None keeps none"
    )

    num_workers: int = setting(4, doc="loader processes per rank; 0 reads in the training process")
    prefetch_factor: int = setting(2, doc="micro-batches each worker reads ahead")
    max_bad_fraction: float = setting(0.01, doc="share of unreadable samples above which the run stops")

    outputs: str = setting("outputs", doc="folder of all runs")
    exp_name: str | None = setting(None, doc="folder of this run below `outputs`; None: date, time and config name")
    log_every: int = setting(10, doc="updates between lines of metrics")
    tensorboard: bool = setting(True, doc="write tensorboard events beside metrics.jsonl")
    wandb: bool = setting(False, doc="log to Weights & Biases; WANDB_MODE=offline needs no account")
    wandb_project: str = setting("opensora_like", doc="project name there")
    ckpt_every: int = setting(0, doc="updates between checkpoints; 0 saves at the end only")
    keep_n_latest: int = setting(-1, doc="complete checkpoints kept; -1 keeps all")
    keep_every: int = setting(
        0, doc="checkpoints of updates that are multiples of this are kept beside the newest ones; 0 keeps none so"
    )
    async_io: bool = setting(False, doc="write checkpoints in the background; a step waits for the copy only")
    on_save_error: Literal["stop", "continue"] = setting("stop", doc="what to do when a checkpoint cannot be written")
    load: str | None = setting(None, doc="checkpoint to resume from, or 'latest' of this run's folder")
    load_weights_only: bool = setting(
        False, doc="with `load`: take its weights (not the EMA) and begin at step 0 with a fresh optimizer and EMA"
    )
    load_sharded: bool | None = setting(
        None,
        doc="with `model.from_pretrained`: True lets each rank read its own part of safetensors or of a checkpoint, so "
        "that no rank has the whole model in host memory; None does so where several ranks share the weights",
    )
    load_strict: bool = setting(
        True, doc="with `load_weights_only`: False takes the tensors that fit and logs every one that does not"
    )
    start_epoch: int | None = setting(None, doc="with `load`: keep weights and optimizer, restart the data here")
    start_step: int | None = setting(None, doc="with `load`: update within `start_epoch` at which the data restart")
    timeout_minutes: float = setting(30.0, doc="after which a collective operation that hangs is an error")
    lora_config: dict | None = setting(
        None,
        doc="arguments of peft.LoraConfig (r, lora_alpha, target_modules, lora_dropout...): the model is frozen, "
        "adapters are trained and saved. None trains the model",
    )
    lora_checkpoint: str | None = setting(
        None, doc="with `lora_config`: adapters to begin from, a LoRA run's checkpoint or a folder of peft"
    )
    custom_imports: list[str] = setting([], doc="modules to import first, so that their classes register themselves")


@dataclass(frozen=True)
class InferenceConfig:
    """A sampling run. Every top-level name of an inference config is a field here."""

    model: dict = setting(doc="denoiser: `type` in MODELS and its arguments")
    autoencoder: dict = setting(doc="`type` in MODELS and its arguments")
    encoders: dict[str, dict] = setting(doc="condition name -> text encoder")
    scheduler: dict = setting({"type": "flow_matching"}, doc="`type` in SCHEDULERS and its arguments, as in training")
    ckpt_path: str | None = setting(None, doc="weights: a training checkpoint (EMA preferred) or safetensors file")
    use_ema: bool = setting(True, doc="take the EMA of a training checkpoint where it has one")
    lora_checkpoint: str | None = setting(
        None, doc="adapters to add to the weights: a LoRA run's checkpoint or a folder of peft"
    )
    prompt: str | None = setting(None, doc="one prompt; or give `prompts`")
    prompts: str | None = setting(None, doc="csv with a column `text`, optionally `name`, `neg`, `ref`")
    negative_prompt: str = setting("", doc="text of the unconditional branch")
    ref: str | None = setting(None, doc="reference image or video of `cond_type`")
    cond_type: str = setting("t2v", doc="t2v, i2v_head, i2v_tail, i2v_loop, v2v_*")
    resolution: str | None = setting(None, doc="e.g. 256px; with `aspect_ratio`, instead of height and width")
    aspect_ratio: str = setting("16:9", doc="width:height, with `resolution`")
    height: int | None = setting(None, doc="pixels")
    width: int | None = setting(None, doc="pixels")
    num_frames: int = setting(129, doc="pixel frames; 1 makes an image")
    num_steps: int = setting(50, doc="steps of the sampler")
    sampler: Literal["euler", "unipc"] = setting("euler", doc="integrator")
    guidance: float = setting(7.5, doc="text guidance scale; 1 is none")
    guidance_img: float = setting(3.0, doc="image guidance scale, for tasks with a reference")
    text_osci: bool = setting(True, doc="use text guidance in the first ten steps and then in every other one")
    image_osci: bool = setting(True, doc="the same for image guidance")
    scale_temporal_osci: bool = setting(True, doc="let image guidance grow along the latent frames")
    distilled_guidance: float = setting(4.0, doc="constant given to models with a guidance embedding")
    motion_score: float | None = setting(None, doc="appended to the prompt as in training; None appends nothing")
    fps_in_caption: bool = setting(True, doc="append the frame rate to the prompt as in training")
    fps_save: int = setting(24, doc="frames per second of the files")
    num_sample: int = setting(1, doc="samples per prompt")
    batch_size: int = setting(1, doc="samples made at once")
    seed: int = setting(42, doc="of the noise; sample k of a prompt differs by k")
    dtype: Literal["bf16", "fp16", "fp32"] = setting("bf16", doc="dtype of the weights")
    offload: bool = setting(
        False,
        doc="keep denoiser, autoencoder and encoders in host memory, each on the device only while it is used",
    )
    save_dir: str = setting("samples", doc="folder of the results")
    custom_imports: list[str] = setting([], doc="modules to import first, so that their classes register themselves")


# top-level shorthand -> the field that it sets; whichever was written last, in a file or on the command line, counts
SHORTHANDS: dict[str, KeyPath] = {
    "lr": ("optim", "lr"),
    "eps": ("optim", "eps"),
    "weight_decay": ("optim", "weight_decay"),
    "plugin": ("booster", "plugin"),
    "plugin_config": ("booster", "plugin_config"),
    "grad_ckpt_settings": ("model", "grad_ckpt_settings"),
    "grad_ckpt_setting": ("model", "grad_ckpt_settings"),
}

# section -> registry of its `type`, and the arguments that the program gives when it builds it
SECTIONS: dict[str, tuple[Registry, tuple[str, ...]]] = {
    "model": (MODELS, ()),
    "autoencoder": (MODELS, ()),
    "encoders.*": (MODELS, ()),
    "scheduler": (SCHEDULERS, ("patch_size",)),
    "dataset": (DATASETS, ("bucket_config", "multiple", "seed")),
    "booster": (BOOSTERS, ("device", "dtype", "grad_clip", "accumulation_steps")),
}


def settings_table(schema: type) -> list[tuple[str, str, str, str]]:
    """(name, type, default, documentation) of every field, for docs/configs.md."""
    rows = []
    for spec in dataclasses.fields(schema):
        hint = typing.get_type_hints(schema)[spec.name]
        readable = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
        if spec.default is not MISSING:
            default = repr(spec.default)
        else:
            default = repr(spec.default_factory()) if spec.default_factory is not MISSING else "required"
        rows.append((spec.name, readable.replace("typing.", ""), default, spec.metadata.get("doc", "")))
    return rows
