"""Open-Sora v2 stage 2: videos from text at 256px and 768px, the tokens of a sample over 4 ranks.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/stage2.py --dataset.data-path table.csv
Hardware: 8 GPUs of 140 GB. Memory: predicted 101 GiB at most per GPU (256px images).
"""

_base_ = [
    "../../_base_/opensora_v2_model.py",
    "../../_base_/opensora_v2_train.py",
    "../../_base_/buckets_stage2.py",
]

model = dict(grad_ckpt_settings=(100, 100))
booster = dict(
    plugin="hybrid",
    plugin_config=dict(
        tp_size=1,
        pp_size=1,
        sp_size=4,
        sequence_parallelism_mode="ring_attn",
        enable_sequence_parallelism=True,
        static_graph=True,
        zero_stage=2,
    ),
)
optim = dict(lr=5e-5)
ckpt_every = 200
