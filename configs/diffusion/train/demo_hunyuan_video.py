"""Text and first frames to video on the shapes world with a small HunyuanVideo. tools/prove.py hunyuan_video runs it.

torchrun --nproc_per_node 2 scripts/diffusion/train.py configs/diffusion/train/demo_hunyuan_video.py
Hardware: two CPU cores; float32, because there it is faster than bfloat16. Measured: about 0.25 s/step, 13 minutes,
loss 0.047 at the end; from text colour 99 %, direction 99 % of 160 samples; from a frame 100 %, 100 % of 96.
"""

_base_ = ["../../_base_/run.py", "../../_base_/shapes_hunyuan_video_model.py", "../../_base_/shapes_train.py"]

dataset = dict(type="video_text", data_path="outputs/demo_hunyuan_video/clips/meta.csv", fps_in_caption=False)
bucket_config = {"16px_ar1:1": {5: (1.0, 8)}}
condition_config = dict(t2v=2.0, i2v_head=1.0)
no_i2v_ref_loss = True
steps = 3000
warmup_steps = 0.0334
exp_name = "demo_hunyuan_video"
