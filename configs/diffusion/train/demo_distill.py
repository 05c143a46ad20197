"""The demo's model in four steps in place of thirty, by adapters: distilled from its weights. tools/prove.py distill.

torchrun --nproc_per_node 2 scripts/diffusion/train.py configs/diffusion/train/demo_distill.py \
    --model.from_pretrained outputs/demo/train
Hardware: two CPU cores; float32, faster there than bfloat16. On shared cores 0.65 s/step; loss 0.91 (generator) and
0.096 (critic). Colour 100 %, direction 100 % of 160 samples; the teacher in these four steps: 38 % and 91 %.
"""

_base_ = ["demo.py"]

distill = dict(times=(1.0, 0.98, 0.95, 0.87), real_guidance=3.0, critic_lr=1e-3)
lora_config = dict(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "v_mlp", "proj", "linear2", "txt_in", "lin", "in_layer", "out_layer"],
)
scheduler = dict(type="flow_matching", t_min=0.02, t_max=0.98)
optim = dict(lr=5e-4, betas=(0.0, 0.99))
dropout_ratio = dict(_delete_=True)
lr_schedule = "constant"
warmup_steps = 20
ema_decay = 0.95
steps = 600
ckpt_every = 300
exp_name = "demo_distill"
