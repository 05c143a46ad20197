"""Fine-tune Wan 2.1 1.3B on two nodes: weights sharded within a node, copied across (HSDP).

srun torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
    scripts/diffusion/train.py configs/diffusion/train/wan2_1_t2v_1_3b_multinode.py
Hardware: 2 nodes of 8 GPUs; more nodes: --booster.dp_replicate_size N --global-batch-size 8N. The published two-node
config keeps a global batch of 8, which 16 ranks cannot share.
"""

_base_ = ["wan2_1_t2v_1_3b.py"]

booster = dict(dp_replicate_size=2)
global_batch_size = 16
