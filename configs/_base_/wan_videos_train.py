"""How Wan is trained on a table of videos at the size of 480p (640x640 pixels, any shape), 81 frames; FSDP2.

python tools/meta.py --input datasets/metadata.json --output datasets/metadata_meta.csv

The numbers are those of VideoX-Fun's recipes: batches of 1, AdamW with weight decay 3e-2 and eps 1e-10, gradients
clipped at 0.05, captions dropped with 0.1. Other sizes and lengths: docs/migration.md.
"""

dataset = dict(type="video_text", data_path="datasets/metadata_meta.csv", fps_max=16.0, fps_in_caption=False)
bucket_config = {"640px": {81: (1.0, 1)}}
sample_posterior = False
dropout_ratio = dict(text=0.1)
optim = dict(type="AdamW", lr=2e-5, weight_decay=3e-2, eps=1e-10)
grad_clip = 0.05
warmup_steps = 100
booster = dict(type="fsdp2")
dtype = "bf16"
epochs = 100
num_workers = 8
