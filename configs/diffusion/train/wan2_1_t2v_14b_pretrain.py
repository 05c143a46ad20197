"""Train Wan 2.1 14B from random weights; two nodes of 8.

srun torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
    scripts/diffusion/train.py configs/diffusion/train/wan2_1_t2v_14b_pretrain.py
Hardware and memory: those of wan2_1_t2v_14b_multinode.py. Other numbers: those of wan2_1_t2v_1_3b_pretrain.py.
"""

_base_ = ["wan2_1_t2v_1_3b_pretrain.py"]

model = dict(variant="t2v-14B")
booster = dict(dp_replicate_size=2)
global_batch_size = 16
