"""Fine-tune Wan 2.1 14B on two nodes: weights sharded within a node, copied across (HSDP).

srun torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
    scripts/diffusion/train.py configs/diffusion/train/wan2_1_t2v_14b_multinode.py
Hardware: 2 nodes of 8 GPUs of 80 GB. --booster.dp_replicate_size 1 shards over both: half the memory, more traffic.
"""

_base_ = ["wan2_1_t2v_14b.py"]

booster = dict(dp_replicate_size=2)
global_batch_size = 16
