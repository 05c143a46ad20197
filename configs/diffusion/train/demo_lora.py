"""A fifth colour for the demo's weights, by adapters: the shapes world with magenta. tools/prove.py lora runs it.

torchrun --nproc_per_node 2 scripts/diffusion/train.py configs/diffusion/train/demo_lora.py \
    --model.from_pretrained outputs/demo/train --dataset.data_path outputs/demo_lora/clips/meta.csv
Hardware: two CPU cores; 0.11 s/step, 2 minutes; all five colours 100 %, direction 100 %.
The table has the four old colours beside the new one, or they would be forgotten.
"""

_base_ = ["demo.py"]

lora_config = dict(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "v_mlp", "proj", "linear2", "txt_in", "lin", "in_layer", "out_layer"],
)
optim = dict(lr=3e-3)
steps = 1000
exp_name = "demo_lora"
