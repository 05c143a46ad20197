"""Text-to-video on the shapes world in the latents of a random HunyuanVideo autoencoder; see tools/prove.py latents.

torchrun --nproc_per_node 2 scripts/diffusion/train.py configs/diffusion/train/demo_latents.py
Hardware: two CPU cores; float32, faster there than bfloat16. On shared cores 0.19 to 0.27 s/step, loss 0.22
at the end; read off latents: colour 100 %, shape 74 %, direction 99 % of 160 samples.
"""

_base_ = ["../../_base_/run.py", "../../_base_/shapes_latents_model.py", "../../_base_/shapes_train.py"]

dataset = dict(type="video_text", data_path="outputs/demo_latents/clips/meta.csv", fps_in_caption=False)
bucket_config = {"32px_ar1:1": {5: (1.0, 8)}}
sample_posterior = False  # the deviations of random weights mean nothing
warmup_steps = 0.025
exp_name = "demo_latents"
