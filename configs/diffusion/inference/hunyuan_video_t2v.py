"""HunyuanVideo: a video of 81 frames from text, as diffusers' HunyuanVideoPipeline makes it.

python scripts/diffusion/inference.py configs/diffusion/inference/hunyuan_video_t2v.py --prompt "a cat walks on grass"
A fine-tuned one: --ckpt-path outputs/RUN
The published weights are made for guidance as an input: --distilled-guidance, not --guidance, which is 1 (none).
Hardware: one GPU. Memory: weights in bfloat16 are predicted to take 40 GiB (denoiser 24, LLaMA 15); --offload True
keeps them in host memory.
"""

_base_ = ["../../_base_/hunyuan_video_models.py"]

resolution = "640px"
aspect_ratio = "16:9"
num_frames = 81
num_steps = 50
sampler = "euler"
time_grid = "even"
guidance = 1.0
distilled_guidance = 6.0
text_osci = False
fps_in_caption = False
fps_save = 16
dtype = "bf16"
save_dir = "samples"
