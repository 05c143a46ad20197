"""HunyuanVideo: a video of 81 frames from its first frame and text.

python scripts/diffusion/inference.py configs/diffusion/inference/hunyuan_video_i2v.py \
    --prompt "a cat walks on grass" --ref cat.png
A fine-tuned one: --ckpt-path outputs/RUN. Memory: as hunyuan_video_t2v.py.
"""

_base_ = ["../../_base_/hunyuan_video_i2v_models.py"]

cond_type = "i2v_head"
resolution = "640px"
aspect_ratio = "16:9"
num_frames = 81
num_steps = 50
sampler = "euler"
time_grid = "even"
guidance = 1.0
guidance_img = 1.0
distilled_guidance = 6.0
text_osci = False
image_osci = False
scale_temporal_osci = False
fps_in_caption = False
fps_save = 16
dtype = "bf16"
save_dir = "samples"
