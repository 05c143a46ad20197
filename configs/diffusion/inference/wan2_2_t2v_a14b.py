"""Wan 2.2 text-to-video: 81 frames at 720x1280 by two experts, as diffusers' WanPipeline makes them.

python scripts/diffusion/inference.py configs/diffusion/inference/wan2_2_t2v_a14b.py --prompt "a cat walks on grass"
Fine-tuned experts: --ckpt-path outputs/HIGH --other-expert.ckpt-path outputs/LOW; adapters: --lora-checkpoint,
--other-expert.lora-checkpoint. Hardware: one GPU of 80 GB; each expert takes 27 GiB in bfloat16 (predicted), with
--offload True one of them at a time.
"""

_base_ = ["../../_base_/wan2_2_t2v_a14b_models.py", "../../_base_/wan_sampling.py"]

other_expert = dict(
    noise="low",
    boundary=0.875,
    from_pretrained="./ckpts/Wan2.2-T2V-A14B-Diffusers/transformer_2",
    guidance=3.0,
)
autoencoder = dict(dtype="fp32")
height = 720
width = 1280
num_frames = 81
num_steps = 40
guidance = 4.0
