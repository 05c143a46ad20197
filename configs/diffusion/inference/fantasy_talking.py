"""FantasyTalking: a portrait speaks a sound file, 480x832, up to 81 frames at 23 per second, with its sound.

python scripts/diffusion/inference.py configs/diffusion/inference/fantasy_talking.py --prompt "a woman talks" \
    --ref portrait.png --audio speech.wav
A fine-tuned one: --ckpt-path outputs/RUN
Hardware: one GPU of 80 GB. Memory: weights in bfloat16 are predicted to take 45 GiB; --offload True keeps them in host
memory.
"""

_base_ = ["../../_base_/fantasy_talking_models.py", "../../_base_/wan_sampling.py"]

autoencoder = dict(dtype="fp32")
cond_type = "i2v_head"
height = 480
width = 832
num_frames = 81
num_steps = 40
guidance = 4.5
audio_guidance = 4.0
fps_save = 23
