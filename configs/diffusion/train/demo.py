"""Text-to-video on the shapes world: a coloured shape that moves, 16x16 pixels, 5 frames. `make demo` runs it.

torchrun --nproc_per_node 2 scripts/diffusion/train.py configs/diffusion/train/demo.py
Hardware: two CPU cores; float32, because there it is faster than bfloat16. On a GPU: --dtype bf16.
Measured on two cores: 0.10 s/step, 7.7 minutes, loss 0.042 at the end; colour 100 %, direction 99 % of 160 samples.
"""

_base_ = ["../../_base_/run.py", "../../_base_/shapes_model.py", "../../_base_/shapes_train.py"]

dataset = dict(type="video_text", data_path="outputs/demo/clips/meta.csv", fps_in_caption=False)
bucket_config = {"16px_ar1:1": {5: (1.0, 8)}}
warmup_steps = 100
exp_name = "demo"
