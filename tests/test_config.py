"""Configs: inheritance, overrides as people type them, clear errors, and where a value came from."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_like.config import FrozenDict, config_text, read_config
from opensora_like.config_file import split_arguments
from opensora_like.evaluation.flags import translate
from opensora_like.settings import InferenceConfig, RunConfig, settings_table
from tools.make_docs import configs_page

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "configs/diffusion/train/demo.py"

BASE = """
model = dict(type="mmdit", in_channels=48, vec_in_dim=64, context_in_dim=64, hidden_size=64, num_heads=4, depth=1,
             depth_single_blocks=1, axes_dim=(4, 6, 6), patch_size=1)
autoencoder = dict(type="patch", patch_size=4)
encoders = dict(text=dict(type="t5", tiny=dict(d_model=64)), pooled=dict(type="clip", tiny=dict(hidden_size=64)))
dataset = dict(type="video_text", data_path="a.csv")
bucket_config = {"256px": {1: (1.0, 4), 33: (0.5, 2)}}
optim = dict(type="AdamW", lr=5e-5)
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.py"
    path.write_text(BASE)
    return path


def child(base: Path, text: str, name: str = "child.py") -> Path:
    path = base.parent / name
    path.write_text(f'_base_ = ["{base.name}"]\n{text}\n')
    return path


def read(path: Path, *arguments: str) -> RunConfig:
    return read_config(path, arguments).config


def spelled(value: object) -> str | None:
    return " ".join(value) if isinstance(value, list) else None


# every row of the table of what the published command line gets wrong: (arguments, key, value)
ACCEPTED = [
    (["--optim.lr", "1e-7"], "optim.lr", 1e-7),
    (["--lr", "1e-7"], "optim.lr", 1e-7),
    (["--lr=1e-4"], "optim.lr", 1e-4),
    (["lr=1e-4"], "optim.lr", 1e-4),
    (["--model.grad-ckpt-settings", "(1,2)"], "model.grad_ckpt_settings", (1, 2)),
    (["--grad-ckpt-settings", "(1,2)"], "model.grad_ckpt_settings", (1, 2)),
    (["--grad_ckpt_setting", "[1, 2]"], "model.grad_ckpt_settings", (1, 2)),
    (["--model.axes_dim", "[4,6,6]"], "model.axes_dim", (4, 6, 6)),
    (["--ema-decay", "0.99"], "ema_decay", 0.99),
    (["--ema-decay", "none"], "ema_decay", None),
    (["--ckpt-every", "1e3"], "ckpt_every", 1000),
    (["--exp-name", "007"], "exp_name", "007"),
    (["--wandb"], "wandb", True),
    (["--wandb", "True"], "wandb", True),
    (["--wandb", "--lr", "1"], "wandb", True),
    (["--wandb", "--lr", "1"], "optim.lr", 1.0),
    (["--dataset.data-path", "a/b-c.csv"], "dataset.data_path", "a/b-c.csv"),
    (["--bucket_config.256px.1", "(1.0,8)"], "bucket_config.256px.1", (1.0, 8)),
    (["--bucket-config.512px.17", "(0.5,2)"], "bucket_config.512px.17", (0.5, 2)),
    (["--encoders.text.max_length", "64"], "encoders.text.max_length", 64),
    (["--encoders.text.tiny.num_layers", "2"], "encoders.text.tiny.num_layers", 2),
    (["--plugin", "zero1"], "booster.plugin", "zero1"),
    (["--start-step", "0", "--start-epoch", "0"], "start_step", 0),
    (["--condition_config", "{'t2v': 1, 'i2v_head': 5}"], "condition_config", {"t2v": 1.0, "i2v_head": 5.0}),
    (["--condition_config", "dict(t2v=1, i2v_head=5)"], "condition_config", {"t2v": 1.0, "i2v_head": 5.0}),
    (["--load", "o/epoch0-global_step9", "o/epoch0-global_step10"], "load", "o/epoch0-global_step10"),
    (["--steps", "-1"], "steps", -1),
]


@pytest.mark.parametrize(
    ("arguments", "key", "value"), ACCEPTED, ids=lambda v: " ".join(v) if isinstance(v, list) else None
)
def test_overrides_mean_what_they_say(base: Path, arguments: list[str], key: str, value: object) -> None:
    """Each way to type an override sets the field it names, with the type of that field."""
    found: object = read(base, *arguments)
    for name in key.split("."):
        found = getattr(found, name) if isinstance(found, RunConfig) else found[int(name) if name.isdigit() else name]
    assert (found == value and type(found) is type(value)) or isinstance(value, dict)


REFUSED = [
    (["--typo-key", "3"], "typo-key|typo_key"),
    (["--learning_rate", "3"], "no such setting"),
    (["--foo.bar", "1"], "--foo: no such setting"),
    (["--model.foo.bar", "1"], "foo"),
    (["--model.depht", "1"], "did you mean .*'depth'"),
    (["--model.typ", "mmdit"], r"--model.typ: .*did you mean \['type'\]"),
    (["--optim.lrr", "1"], "did you mean .*'lr'"),
    (["--encoders.text.max_lenght", "1"], "max_length"),
    (["--model.type", "mmdt"], "unknown model 'mmdt'; did you mean .*'mmdit'"),
    (["--model.type", "hunyuan_vae"], "'hunyuan_vae' has no 'adapt_weights' and cannot be the model; use .*'mmdit'"),
    (["--autoencoder.type", "t5"], "'t5' has no 'decode' and cannot be the autoencoder; use one of .*'dc_ae'"),
    (["--booster.type", "colossal"], "did you mean .*'colossalai'"),
    (["--bucket-config", "{...}"], "bucket.config"),
    (["--wandb", "yes"], "bool"),
    (["--steps", "many"], "int"),
    (["--steps", "1.5"], "int"),
    (["--lr", "fast"], "lr"),
    (["--condition_config", "dict(print(1), t2v=1)"], "condition_config=.* must be a dict, not str"),
    (["--condition_config", "dict(t2v=open('x'))"], "condition_config=.* must be a dict, not str"),
    (["--dtype", "bf61"], "bf16"),
    (["--lr"], "needs a value"),
    (["--lr", "1", "2"], "one value"),
    (["stray"], "belongs to no key"),
    (["--model.axes_dim", "7"], "axes_dim"),
    (["--optim.betas", "(0.9,)"], "1 entries, 2 are needed"),
    (["--dataset.data-path.x", "1"], "no parts to set"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=spelled)
def test_mistyped_overrides_are_errors(base: Path, arguments: list[str], message: str) -> None:
    """What would be dropped, mispaired or ignored is refused, and the message names it."""
    with pytest.raises(ValueError, match=message):
        read(base, *arguments)


@pytest.mark.parametrize("spec", [name for name, *_ in settings_table(RunConfig)])
def test_a_typo_in_any_key_is_an_error_that_names_the_key(base: Path, spec: str) -> None:
    """One letter wrong in any top-level key, in the file or on the command line, names the right one."""
    typo = spec[:-1] + ("x" if spec[-1] != "x" else "y")
    with pytest.raises(ValueError, match=f"'{spec}'"):
        read(child(base, f"{typo} = 1"))
    with pytest.raises(ValueError, match=f"'{spec}'"):
        read(base, f"--{typo}", "1")


def test_shorthand_and_field_in_layers(base: Path) -> None:
    """`lr` and `optim.lr` are one thing: whichever was written last counts; both in one file must agree."""
    assert read(child(base, "lr = 1e-4")).optim["lr"] == 1e-4
    grandchild = child(child(base, "lr = 1e-4"), "optim = dict(lr=2e-4)", "grandchild.py")
    assert read(grandchild).optim["lr"] == 2e-4
    assert read(grandchild, "--lr", "3e-4").optim["lr"] == 3e-4
    assert read(child(grandchild, "lr = 5e-5", "great.py")).optim["lr"] == 5e-5
    assert read(child(base, "lr = 1e-4\noptim = dict(lr=lr)")).optim["lr"] == 1e-4
    with pytest.raises(ValueError, match=r"child.py:2 sets lr=0.0001, .*child.py:3 sets optim.lr=0.0002"):
        read(child(base, "lr = 1e-4\noptim = dict(lr=2e-4)"))


def test_parts_of_a_shorthand(base: Path) -> None:
    """`plugin_config` is reached into, and merges with what is inherited, as the section does that it stands for."""
    parent = child(base, 'booster = dict(type="colossalai", plugin_config=dict(overlap_allgather=False))', "parent.py")
    size, kept = {"reduce_bucket_size_in_m": 64}, {"overlap_allgather": False}
    for read_so in (
        read(parent, "--plugin_config.reduce_bucket_size_in_m", "64"),
        read(child(parent, "plugin_config = dict(reduce_bucket_size_in_m=64)")),
        read(
            child(parent, "plugin_config = dict(reduce_bucket_size_in_m=1)"),
            "--plugin-config.reduce-bucket-size-in-m=64",
        ),
    ):
        assert read_so.booster["plugin_config"] == kept | size
    replaced = child(parent, "plugin_config = dict(_delete_=True, reduce_bucket_size_in_m=64)")
    assert read(replaced).booster["plugin_config"] == size
    assert read(parent, "--plugin_config", str(size)).booster["plugin_config"] == size
    explained = read_config(child(parent, "plugin_config = dict(reduce_bucket_size_in_m=64)"))
    assert "child.py:2" in explained.explain("plugin_config.reduce_bucket_size_in_m")
    with pytest.raises(ValueError, match=r"--booster\.plugn: no such argument"):
        read(parent, "--booster.plugn", "zero2")


def test_both_spellings_of_the_checkpointed_blocks(base: Path) -> None:
    """`grad_ckpt_setting`, which the published guide writes, changes what is inherited as `grad_ckpt_settings`."""
    parent = child(base, "model = dict(grad_ckpt_settings=(1, 1))", "parent.py")
    for read_so in (
        read(parent, "--model.grad_ckpt_setting", "(0, 1)"),
        read(child(parent, "model = dict(grad_ckpt_setting=(0, 1))")),
        read(child(parent, "grad_ckpt_setting = (0, 1)\nmodel = dict(grad_ckpt_setting=grad_ckpt_setting)")),
    ):
        assert read_so.model["grad_ckpt_settings"] == (0, 1) and "grad_ckpt_setting" not in read_so.model


def test_delete_replaces_and_dicts_merge(base: Path) -> None:
    """A dict merges into the base's; with _delete_ it replaces it; keys that count frames stay integers."""
    merged = read(child(base, 'bucket_config = {"256px": {65: (1.0, 1)}}'))
    assert merged.bucket_config == {"256px": {1: (1.0, 4), 33: (0.5, 2), 65: (1.0, 1)}}
    replaced = read(child(base, 'bucket_config = {"_delete_": True, "512px": {"9": (1.0, 1)}}'))
    assert replaced.bucket_config == {"512px": {9: (1.0, 1)}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "did you mean .*steps"),
        ("steps = 'ten'", "steps='ten'"),
        ("model = dict(depth='two')", "model.depth='two' must be int"),
        ("model = dict(hiden_size=3)", "hidden_size"),
        ("dataset = dict(_delete_=True, data_path='x')", "dataset.* 'type'"),
        ("model = 3", "cannot be read|must be a dict"),
        ("x = (", "line 2"),
        ("custom_imports = ['no_such_module']", "no_such_module"),
        ("booster = dict(dtype='bf16')", "set by the program"),
    ],
)
def test_mistakes_in_files_are_errors(base: Path, text: str, message: str) -> None:
    """A config that cannot be meant is refused with the place and the nearest names."""
    with pytest.raises(ValueError, match=message):
        read(child(base, text))


def test_missing_files(base: Path, tmp_path: Path) -> None:
    """A missing config or base is named, with the nearest names, or with what is there instead."""
    with pytest.raises(FileNotFoundError, match=r"did you mean \['.*base\.py'\]"):
        read(tmp_path / "bsae.py")
    with pytest.raises(FileNotFoundError, match=r"there are \['.*base\.py'\]"):
        read(tmp_path / "another.py")
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'"):
        read(tmp_path / "nowhere/base.py")
    below = tmp_path / "train/stage7.py"
    below.parent.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config in folder '.*train'"):
        read(below)
    below.write_text("steps = 1")
    with pytest.raises(FileNotFoundError, match=r"did you mean \['.*train/stage7\.py'\]"):
        read(tmp_path / "stage7.py")
    (tmp_path / "folders/train").mkdir(parents=True)
    below.rename(tmp_path / "folders/train/stage7.py")
    with pytest.raises(FileNotFoundError, match=r"there are \['.*folders/train/stage7\.py'\]"):
        read(tmp_path / "folders/another.py")
    with pytest.raises(FileNotFoundError, match=r"its base 'gone.py'"):
        read(child(tmp_path / "gone.py", "steps = 1"))
    loop = tmp_path / "loop.py"
    loop.write_text('_base_ = ["loop.py"]')
    with pytest.raises(ValueError, match="inherits from itself"):
        read(loop)


def test_explain_names_the_source(base: Path) -> None:
    """--explain tells file and line, flag, or default, whichever spelling set the value."""
    path = child(base, "steps = 7\nlr = 1e-3")
    explained = read_config(path, ["--model.depth", "3"])
    assert explained.explain("steps") == f"steps = 7  ({path}:2)"
    assert explained.explain("optim.lr") == f"optim.lr = 0.001  ({path}:3)"
    assert explained.explain("--lr").endswith("child.py:3)")
    assert explained.explain("model.depth") == "model.depth = 3  (--model.depth 3)"
    assert explained.explain("model.hidden_size").endswith("base.py:2)")
    assert explained.explain("grad_clip") == "grad_clip = 1.0  (default of RunConfig)"
    assert "base.py" in explained.explain("bucket_config.256px.33")
    with pytest.raises(ValueError, match=r"did you mean .*depth"):
        explained.explain("model.dept")


def test_the_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    """What is written into the run's folder is a config that means the same run."""
    config = read(DEMO, "--lr", "3e-4", "--bucket_config.16px_ar1:1.9", "((0.5, 0.1), 2)", "--exp-name", "a b'c")
    path = tmp_path / "resolved.py"
    path.write_text(config_text(config))
    assert read(path) == config


def test_a_config_is_frozen(base: Path) -> None:
    """Nothing edits a config while it trains."""
    config = read(base)
    with pytest.raises(AttributeError):
        config.steps = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="frozen"):
        config.bucket_config["256px"].pop(1)
    assert isinstance(config.model, FrozenDict)


def test_custom_imports_register_user_classes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class outside the package takes part after custom_imports, in both spellings of it."""
    (tmp_path / "user_code.py").write_text(
        "from opensora_like.registry import SCHEDULERS\n"
        "@SCHEDULERS.register_module('users_own')\n"
        "class Own:\n    def __init__(self, strength: float = 1.0):\n        self.strength = strength\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = "scheduler = dict(_delete_=True, type='users_own', strength=2)"
    assert read(child(base, f"custom_imports = ['user_code']\n{own}")).scheduler == {
        "type": "users_own",
        "strength": 2.0,
    }
    as_mmengine = f"custom_imports = dict(imports=['user_code'], allow_failed_imports=False)\n{own}"
    assert read(child(base, as_mmengine, "c2.py")).custom_imports == ["user_code"]


def test_words_pair_up() -> None:
    """Pairs, equals signs, bare flags, negative numbers and values with blanks."""
    words = ["--a", "1", "--b=x=y", "--flag", "--c.d-e", "-5", "f=2"]
    assert split_arguments(words) == [("a", ["1"]), ("b", ["x=y"]), ("flag", []), ("c.d-e", ["-5", "f=2"])]


def test_every_setting_is_documented() -> None:
    """docs/configs.md is what the program says of itself (tools/make_docs.py writes it)."""
    assert (ROOT / "docs/configs.md").read_text() == configs_page()
    for schema in (RunConfig, InferenceConfig):
        for name, _, _, doc in settings_table(schema):
            assert doc, f"{name} has no documentation"


# what the published training and sampling scripts read
READ_IN_TRAINING = """
dtype seed outputs exp_name plugin plugin_config grad_clip dataset bucket_config num_bucket_build_workers num_workers
prefetch_factor batch_size pin_memory_cache_pre_alloc_numels model ae t5 clip grad_checkpoint grad_ckpt_buffer_size
ema_decay lora_config lora_checkpoint cached_video cached_text optim epochs warmup_steps use_cosine_scheduler load
start_epoch start_step load_master_weights save_master_weights update_warmup_steps initial_lr warmup_ae sigma_min
accumulation_steps ckpt_every keep_n_latest log_every async_io is_causal_vae condition_config patch_size dropout_ratio
guidance no_i2v_ref_loss wandb wandb_project record_time record_barrier nsys nsys_warmup_steps nsys_num_steps
ae_spatial_compression lr eps grad_ckpt_settings optim.cls optim.adamw_mode optim.lr
"""
READ_IN_SAMPLING = """
save_dir seed batch_size dtype cond_type dataset prompt ref resolution guidance guidance_img num_steps num_frames
aspect_ratio ckpt_path motion_score fps_save num_sample num_samples start_index end_index prompt_refine use_t2i2v
img_resolution offload_model save_prefix prompt_as_path pretrained_lora_path patch_size prefetch_factor num_workers
img_flux img_flux_ae plugin plugin_config plugin_ae plugin_config_ae is_causal_vae ae_spatial_compression model ae t5
clip dataset.data_path sampling_option.resolution sampling_option.height sampling_option.seed sampling_option.flow_shift
sampling_option.shift sampling_option.method sampling_option.is_causal_vae sampling_option.temporal_reduction
sampling_option.text_osci sampling_option.image_osci sampling_option.scale_temporal_osci offload refine_prompt
"""


@pytest.mark.parametrize("flag", READ_IN_TRAINING.split())
def test_every_setting_of_open_sora_has_a_place_in_training(flag: str) -> None:
    """It is a setting here, or the error says what stands in its place."""
    _is_known_or_explained(ROOT / "configs/diffusion/train/stage1.py", f"--{flag}", RunConfig)


@pytest.mark.parametrize("flag", READ_IN_SAMPLING.split())
def test_every_setting_of_open_sora_has_a_place_in_sampling(flag: str) -> None:
    """As in training; those that its documents name are taken as they are."""
    (word,) = translate([f"--{flag}"])
    _is_known_or_explained(ROOT / "configs/diffusion/inference/256px.py", word, InferenceConfig)


def _is_known_or_explained(config: Path, flag: str, schema: type) -> None:
    try:
        read_config(config, [f"{flag}=none"], schema=schema)
    except ValueError as problem:  # a setting that is known may not be None
        known = re.search("=None (must be|is not one of|does not fit)", problem.args[0])
        assert known or "is Open-Sora v2's: " in problem.args[0], problem


def test_settings_of_open_sora_in_a_file(base: Path) -> None:
    """The error names what they are called here."""
    with pytest.raises(ValueError, match="unknown setting 'ae'; 'ae' is Open-Sora v2's: use autoencoder"):
        read(child(base, 'ae = dict(type="hunyuan_vae")'))
    with pytest.raises(ValueError, match=r"optim\.cls: 'optim\.cls' is Open-Sora v2's: use optim\.type"):
        read(child(base, 'optim = dict(cls="HybridAdam")'))
    with pytest.raises(ValueError, match="plugin='hybrid': 'plugin' is Open-Sora v2's: use sp_size"):
        sampling = ROOT / "configs/diffusion/inference/256px.py"
        file = base.parent / "sampling.py"
        file.write_text(f'_base_ = ["{sampling}"]\nplugin = "hybrid"\n')
        read_config(file, schema=InferenceConfig)


def test_a_config_of_the_other_kind() -> None:
    """Training is not sampled with, nor the other way round, and the error says where the others are."""
    train, sample = (ROOT / f"configs/diffusion/{name}" for name in ("train/stage1.py", "inference/256px.py"))
    with pytest.raises(ValueError, match=r"stage1.py is for training .* one of configs/diffusion/inference"):
        read_config(train, schema=InferenceConfig)
    with pytest.raises(ValueError, match=r"256px.py is for sampling .* one of configs/diffusion/train"):
        read_config(sample)


def run_train(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/diffusion/train.py"), str(DEMO), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_train_script_dumps_and_explains() -> None:
    """--dump and --explain answer without training, and a mistake is one line without a traceback."""
    assert "steps = " in run_train("--dump").stdout
    assert run_train("--explain", "optim.lr", "--lr", "1").stdout.strip() == "optim.lr = 1.0  (--lr 1)"
    wrong = run_train("--lrr", "1")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and "'lr'" in wrong.stderr
