"""Open-Sora v2 at 256px: a video of 129 frames from text, or from text and an image.

python scripts/diffusion/inference.py configs/diffusion/inference/256px.py --prompt "raining, sea"
With an image: --cond-type i2v_head --ref image.png
Hardware: one GPU. Memory: predicted 35 GiB for weights in bfloat16 (denoiser 22, T5 9), more while sampling.
"""

_base_ = ["../../_base_/opensora_v2_model.py"]

model = dict(cond_embed=True, from_pretrained="./ckpts/Open_Sora_v2.safetensors")
resolution = "256px"
aspect_ratio = "16:9"
num_frames = 129
num_steps = 50
guidance = 7.5
guidance_img = 3.0
text_osci = True
image_osci = True
scale_temporal_osci = True
motion_score = 4.0
fps_save = 24
cond_type = "t2v"
batch_size = 1
seed = 42
dtype = "bf16"
save_dir = "samples"
