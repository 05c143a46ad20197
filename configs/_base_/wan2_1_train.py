"""How Wan 2.1 is trained on cached clips of 81 frames at 480x832, whatever it starts from; FSDP2 over all ranks.

A longer clip of the cache gives a window of 81 frames, another one in each epoch; for other sizes change
`bucket_config`. Captions drop out with 0.1, as the published trainer's cfg_dropout_prob means to; there it never
reaches this model.
"""

dataset = dict(type="latents", cache_path="cache/480p")
bucket_config = {"480x832": {81: (1.0, 1)}}
sample_posterior = False
dropout_ratio = dict(text=0.1)
booster = dict(type="fsdp2")
dtype = "bf16"
grad_clip = 1.0
global_batch_size = 8
local_batch_size = 1
num_workers = 2
