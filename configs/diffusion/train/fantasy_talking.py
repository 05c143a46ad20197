"""Fine-tune FantasyTalking, speech-driven image to video: of Wan 2.1 14B only what reads the speech is trained.

python tools/meta.py --input datasets/speech.json --output datasets/speech_meta.csv
torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/fantasy_talking.py \
    --dataset.data-path datasets/speech_meta.csv
Hardware: 8 GPUs of 80 GB. Memory, s/step and loss: not measured yet. See docs/fantasy_talking.md.
"""

_base_ = ["../../_base_/run.py", "../../_base_/fantasy_talking_models.py"]

model = dict(grad_checkpoint=True)
trainable_modules = ["processor.", "proj_model."]
dataset = dict(type="video_speech", data_path="datasets/speech_meta.csv", fps_max=30.0)
bucket_config = {"512px": {81: (1.0, 1), 49: (1.0, 1), 25: (1.0, 1)}}
condition_config = dict(i2v_head=1.0)
dropout_ratio = dict(text=0.1, audio=0.1)
sample_posterior = False
scheduler = dict(t_distribution="uniform")
optim = dict(type="AdamW", lr=2e-5, weight_decay=3e-2, eps=1e-10)
lr_schedule = "constant"
warmup_steps = 100
grad_clip = 0.05
booster = dict(type="fsdp2")
dtype = "bf16"
epochs = 100
ckpt_every = 50
num_workers = 8
