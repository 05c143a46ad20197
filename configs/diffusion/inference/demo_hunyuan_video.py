"""Samples of the shapes world from a small HunyuanVideo, from text, or from text and a first frame.

python scripts/diffusion/inference.py configs/diffusion/inference/demo_hunyuan_video.py \
    --prompt "a red circle moving left" [--ref frame.png --cond-type i2v_head]
"""

_base_ = ["../../_base_/shapes_hunyuan_video_model.py", "../../_base_/shapes_sampling.py"]

ckpt_path = "outputs/demo_hunyuan_video/train"
save_dir = "outputs/demo_hunyuan_video/samples"
height = 16
width = 16
guidance_img = 1.0
image_osci = False
scale_temporal_osci = False
