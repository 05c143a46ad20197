"""Open-Sora v2 stage 1 with given frames: text and images to video at 256px.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/stage1_i2v.py \
    --dataset.data-path table.csv --model.from_pretrained ckpts/Open_Sora_v2.safetensors
Hardware and memory: those of stage1.py.
"""

_base_ = ["stage1.py", "../../_base_/i2v_tasks.py"]

model = dict(cond_embed=True)
optim = dict(lr=1e-5)
