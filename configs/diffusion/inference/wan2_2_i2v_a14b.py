"""Wan 2.2 image-to-video: 81 frames at 480x832 from a first frame by two experts, as diffusers makes them.

python scripts/diffusion/inference.py configs/diffusion/inference/wan2_2_i2v_a14b.py --prompt "a cat" --ref cat.png
Fine-tuned experts, adapters, hardware: as wan2_2_t2v_a14b.py.
"""

_base_ = ["../../_base_/wan2_2_i2v_a14b_models.py", "../../_base_/wan_sampling.py"]

other_expert = dict(
    noise="low",
    boundary=0.9,
    from_pretrained="./ckpts/Wan2.2-I2V-A14B-Diffusers/transformer_2",
)
cond_type = "i2v_head"
autoencoder = dict(dtype="fp32")
height = 480
width = 832
num_frames = 81
num_steps = 40
guidance = 3.5
