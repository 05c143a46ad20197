"""What a run can be told: the fields of a config, their types, defaults and meaning."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, NamedTuple

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
class Distill:
    """Distribution matching distillation, see docs/distillation.md.

    Args:
        times: at which the generator is evaluated, before the shift of `scheduler`; 1 is noise.
        gen_update_interval: updates of the critic after each one of the generator.
        real_guidance: scale of text guidance in the teacher's score; 1 is none.
        fake_guidance: the same in the critic's; 0 and 1 are none.
        critic_lr: in place of `optim.lr`, for the critic.
        negative_prompt: caption of the branch that guidance leads away from.
        boundary: time after the shift at which two experts take turns; None trains one model for all times. The
            high expert is trained on the steps from noise down to it; with `before`, the low expert on the others.
        before: `from_pretrained`, and `lora_checkpoint` if it has one, of the high expert: what the low one goes on
            from.
    """

    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    gen_update_interval: int = 5
    real_guidance: float = 6.0
    fake_guidance: float = 0.0
    critic_lr: float = 1e-6
    negative_prompt: str = ""
    boundary: float | None = None
    before: dict[str, str] | None = None


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
    motion_loss_ratio: float = setting(
        0.0, doc="share of a sample's loss that is the squared error of the changes from latent frame to frame"
    )
    error_cut: float | None = setting(
        None, doc="elements of the velocity that are off by more than this count as 0 in the loss; None counts all"
    )
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
    accumulation_steps: int = setting(1, doc="micro-batches per rank and update; or set `global_batch_size`")
    global_batch_size: int | None = setting(
        None, doc="samples per update; accumulation_steps follows from it, the batch size and the number of ranks"
    )
    local_batch_size: int | None = setting(
        None, doc="samples per micro-batch and rank, in place of the batch size of every bucket; None: the buckets'"
    )
    grad_ckpt_buffer_size: int = setting(
        0,
        doc="bytes of pinned host memory per rank that hold, between forward and backward, what the backward needs "
        "(the blocks' inputs, with grad_ckpt_settings); what does not fit stays on the device. 0 is off",
    )
    grad_clip: float = setting(1.0, doc="largest global L2 norm of the gradients; 0 does not clip")
    warmup_steps: int | float = setting(
        0, doc="updates over which lr rises linearly; below 1 it is a share of the updates after which lr is at its end"
    )
    warmup_lr: float | None = setting(
        None, doc="lr of the first update of the warm-up; None: lr / (warmup_steps + 1), a straight line from 0"
    )
    lr_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = setting(
        "constant", doc="after the warm-up: linear, cosine and (at the end only) wsd fall to `min_lr`"
    )
    min_lr: float = setting(0.0, doc="where lr_schedule ends, or what it does not go below")
    lr_decay_steps: int | None = setting(None, doc="update at which lr_schedule is at its end; None: the last one")
    wsd_decay_steps: int | None = setting(None, doc="updates of the fall of wsd; None: a tenth of all")
    wsd_decay: Literal["linear", "cosine", "exponential", "minus_sqrt"] = setting("linear", doc="shape of that fall")
    weight_decay_end: float | None = setting(
        None, doc="weight decay at `weight_decay_steps`, coming from optim.weight_decay; None: it stays"
    )
    weight_decay_steps: int | None = setting(None, doc="updates that this takes; None: all")
    weight_decay_schedule: Literal["linear", "cosine"] = setting("linear", doc="shape of the way there")
    ema_decay: float | None = setting(
        None, doc="decay of the float32 moving average of the weights, reached by warm-up; None keeps none"
    )

    num_workers: int = setting(4, doc="loader processes per rank; 0 reads in the training process")
    prefetch_factor: int = setting(2, doc="micro-batches each worker reads ahead")
    pin_memory: bool | None = setting(
        None, doc="read batches into page-locked memory, which is kept for reuse; None: with a GPU"
    )
    device_prefetch: bool | None = setting(
        None, doc="copy the next batch to the GPU on a stream of its own during a step; None: with a GPU"
    )
    gc_every: int = setting(
        0, doc="updates after which all ranks collect Python's garbage together; 0 lets each do so at any time"
    )
    compile_blocks: str | None = setting(
        None, doc="backend of torch.compile (inductor) for each block of the denoiser; None does not compile"
    )
    compile_autoencoder: str | None = setting(
        None, doc="backend of torch.compile for encoder and decoder of the autoencoder; None does not compile"
    )
    max_bad_fraction: float = setting(0.01, doc="share of unreadable samples above which the run stops")

    outputs: str = setting("outputs", doc="folder of all runs")
    exp_name: str | None = setting(None, doc="folder of this run below `outputs`; None: date, time and config name")
    log_every: int = setting(10, doc="updates between lines of metrics")
    tensorboard: bool = setting(True, doc="write tensorboard events beside metrics.jsonl")
    wandb: bool = setting(False, doc="log to Weights & Biases; WANDB_MODE=offline needs no account")
    wandb_project: str = setting("opensora_like", doc="project name there")
    validation: dict | None = setting(
        None,
        doc="losses of held-out clips with fixed noise, paired with the weights of the beginning: `every` (updates), "
        "`dataset` (keys of `dataset` that differ, as data_path) or `share` (of the table's rows, which training then "
        "leaves out), `num_clips` (64), `num_bins` (8) of t. None: off",
    )
    sample_every: int = setting(0, doc="updates between videos sampled with the weights of the run; 0 samples none")
    sampling: dict = setting(
        {},
        doc="for `sample_every`: `prompts` (a list, or a csv), `height`, `width`, `num_frames`, `num_steps`, "
        "`guidance`, `seed` and other settings of an inference config",
    )
    peak_tflops: float | None = setting(
        None,
        doc="TFLOP/s of a process' device at `dtype` (H200, bf16: 989): metrics then have `tflops`, the model's "
        "forward and backward without recomputation, and `mfu`, its share of the peak",
    )
    spike_factor: float = setting(
        10.0, doc="a grad_norm above this times the median of the last 100 is reported with its samples; 0 reports none"
    )
    ckpt_every: int = setting(0, doc="updates between checkpoints; 0 saves at the end only")
    keep_n_latest: int = setting(-1, doc="complete checkpoints kept; -1 keeps all")
    keep_every: int = setting(
        0, doc="checkpoints of updates that are multiples of this are kept beside the newest ones; 0 keeps none so"
    )
    async_io: bool = setting(False, doc="write checkpoints in the background; a step waits for copies only")
    on_save_error: Literal["stop", "continue"] = setting("stop", doc="what to do when a checkpoint cannot be written")
    load: str | None = setting(None, doc="checkpoint to resume from, or 'latest' of this run's folder")
    load_weights_only: bool = setting(
        False, doc="with `load`: take its weights (not the EMA) and begin at step 0 with a fresh optimizer and EMA"
    )
    load_sharded: bool | None = setting(
        None,
        doc="with `model.from_pretrained`: True lets each rank read its own part of safetensors or of a checkpoint, so "
        "that no rank has the whole model in host memory; None does so on several ranks with every booster but ddp, "
        "unless the file lacks weights that begin with random numbers",
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
        None,
        doc="with `lora_config`: adapters to begin from: a LoRA run's checkpoint, a folder of peft, or a file of peft, "
        "diffusers, kohya or ComfyUI",
    )
    trainable_modules: list[str] | None = setting(
        None,
        doc="train the parameters whose names have one of these parts in them (as 'attn2.', 'norm'), freeze the others "
        "and save those that are trained alone; None trains all",
    )
    lr_scales: dict[str, float] = setting(
        {}, doc="part of parameters' names -> what `optim.lr` is multiplied with for them; 1 for all others"
    )
    distill: dict | None = setting(
        None,
        doc="train a generator of few steps against a critic, from a teacher: `times` (1, 0.75, 0.5, 0.25, before the "
        "shift), `gen_update_interval` (5), `real_guidance` (6), `fake_guidance` (0), `critic_lr` (1e-6), "
        "`negative_prompt`, and for one of two experts `boundary` and `before`. None: flow matching",
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
        None,
        doc="adapters to add to the weights: a LoRA run's checkpoint, a folder of peft, or a file of peft, diffusers, "
        "kohya or ComfyUI",
    )
    lora_scale: float = setting(1.0, doc="with `lora_checkpoint`: what the adapters are multiplied with")
    other_expert: dict | None = setting(
        None,
        doc="a second denoiser of the same sizes, for a part of the times (Wan 2.2): `boundary` (0.9), `noise` ('low', "
        "'high'), `from_pretrained` or `ckpt_path`, `use_ema`, `lora_checkpoint`, `lora_scale`, `guidance`",
    )
    prompt: str | None = setting(None, doc="one prompt; or give `prompts`")
    prompts: str | None = setting(None, doc="csv with a column `text`, optionally `name`, `neg`, `ref`, `audio`")
    start_index: int = setting(0, doc="first row of `prompts` that is made, from 0")
    end_index: int | None = setting(None, doc="row of `prompts` before which to stop; None makes all that follow")
    negative_prompt: str = setting("", doc="text of the unconditional branch")
    refine_prompt: bool = setting(
        False,
        doc="let a language model rewrite prompts first: OPENAI_API_KEY, OPENAI_BASE_URL and OPENAI_MODEL (gpt-4o) of "
        "the environment name it",
    )
    ref: str | None = setting(
        None, doc="reference image or video of `cond_type`, a file or an http(s) address; several joined by ';'"
    )
    audio: str | None = setting(
        None, doc="file of what is said, for a denoiser that hears; it tells how long the video is, up to `num_frames`"
    )
    max_reference_mb: float = setting(256.0, doc="MB (10**6 bytes) above which a reference is not fetched")
    cond_type: str = setting("t2v", doc="t2v, i2v_head, i2v_tail, i2v_loop, v2v_*")
    first_image: dict | None = setting(
        None,
        doc="`type` in MODELS and its arguments: what draws an image from the prompt of each sample without a "
        "reference, for `cond_type` i2v_*; None: references are given",
    )
    resolution: str | None = setting(None, doc="e.g. 256px; with `aspect_ratio`, instead of height and width")
    aspect_ratio: str = setting("16:9", doc="width:height, with `resolution`")
    height: int | None = setting(None, doc="pixels")
    width: int | None = setting(None, doc="pixels")
    num_frames: int = setting(129, doc="pixel frames; 1 makes an image")
    num_steps: int = setting(50, doc="steps of the sampler")
    sampler: Literal["euler", "unipc", "few_step"] = setting(
        "euler", doc="integrator; few_step jumps to the data and adds noise again, as a distilled model was trained"
    )
    few_step_times: list[float] | None = setting(
        None, doc="for sampler few_step: `distill.times` of the training, before the shift, `num_steps` of them"
    )
    time_grid: Literal["even", "diffusers"] = setting(
        "even",
        doc="times before the shift: even from 1 to 0, or those of diffusers' scheduler of this sampler, for the "
        "results of its pipelines",
    )
    guidance: float = setting(7.5, doc="text guidance scale; 1 is none")
    guidance_img: float = setting(3.0, doc="image guidance scale, for tasks with a reference")
    audio_guidance: float | None = setting(
        None, doc="scale of guidance by sound, for a denoiser that hears; 1 is none, and so is None"
    )
    text_osci: bool = setting(True, doc="use text guidance in the first ten steps and then in every other one")
    image_osci: bool = setting(True, doc="the same for image guidance")
    scale_temporal_osci: bool = setting(True, doc="let image guidance grow along the latent frames")
    distilled_guidance: float = setting(4.0, doc="constant given to models with a guidance embedding")
    motion_score: float | Literal["dynamic"] | None = setting(
        None,
        doc="appended to the prompt as in training; 'dynamic' asks the language model of `refine_prompt` for each "
        "prompt, None appends nothing",
    )
    fps_in_caption: bool = setting(True, doc="append the frame rate to the prompt as in training")
    fps_save: int = setting(24, doc="frames per second of the files")
    num_sample: int = setting(1, doc="samples per prompt")
    batch_size: int = setting(1, doc="samples made at once")
    seed: int = setting(42, doc="of the noise; sample k of a prompt differs by k")
    sp_size: int | Literal["all"] = setting(
        1, doc="processes that share each video, its tokens cut among them; 'all' of them, or a divisor of their number"
    )
    sp_mode: Literal["ring", "all_to_all"] = setting(
        "ring", doc="how they share attention; all_to_all needs heads that `sp_size` divides"
    )
    timeout_minutes: float = setting(30.0, doc="after which a process that waits for others in vain is an error")
    dtype: Literal["bf16", "fp16", "fp32"] = setting("bf16", doc="dtype of the weights")
    offload: bool = setting(
        False,
        doc="keep denoiser, autoencoder and encoders in host memory, each on the device only while it is used",
    )
    save_dir: str = setting("samples", doc="folder of the results, seen by all processes")
    overwrite: bool = setting(
        False,
        doc="make files again that are there; False keeps them if they were asked for with the same settings, and is "
        "an error if not",
    )
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
# an argument's second spelling -> the argument; so a config may change in one what it inherits in the other
SPELLINGS: dict[KeyPath, KeyPath] = {("model", "grad_ckpt_setting"): ("model", "grad_ckpt_settings")}


class Section(NamedTuple):
    """A section that names a class.

    Args:
        registry: of its `type`.
        given: arguments that the program gives when it builds it.
        methods: what the class must have, since denoisers, autoencoders and encoders are in one registry.
    """

    registry: Registry
    given: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


PLAIN_SECTIONS = {"optim": Optim, "distill": Distill}  # sections of numbers and words, without a registry
SECTIONS = {
    "model": Section(MODELS, methods=("adapt_weights", "parallel_plan")),
    "autoencoder": Section(MODELS, methods=("decode", "latent_shape")),
    "encoders.*": Section(MODELS),
    "first_image": Section(MODELS, methods=("draw",)),
    "scheduler": Section(SCHEDULERS, given=("patch_size",)),
    "dataset": Section(DATASETS, given=("bucket_config", "multiple", "seed")),
    "booster": Section(BOOSTERS, given=("device", "dtype", "grad_clip", "accumulation_steps")),
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
