"""The shapes world from a first frame and text: goes on from the demo's weights. tools/prove.py i2v runs it.

torchrun --nproc_per_node 2 scripts/diffusion/train.py configs/diffusion/train/demo_i2v.py \
    --model.from_pretrained outputs/demo/train
Hardware and s/step: those of demo.py. Direction 98 %, colour 100 % of 96 new clips.
"""

_base_ = ["demo.py"]

model = dict(cond_embed=True)
condition_config = dict(t2v=1.0, i2v_head=3.0)
optim = dict(lr=1e-3)
steps = 2000
exp_name = "demo_i2v"
