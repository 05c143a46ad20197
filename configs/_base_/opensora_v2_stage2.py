"""The model and the run of Open-Sora v2's second stage: the tokens of a sample over 4 ranks."""

_base_ = ["opensora_v2_model.py", "opensora_v2_train.py"]

model = dict(grad_ckpt_settings=(100, 100))
booster = dict(
    plugin="hybrid",
    plugin_config=dict(
        tp_size=1,
        pp_size=1,
        sp_size=4,
        sequence_parallelism_mode="ring_attn",
        enable_sequence_parallelism=True,
        static_graph=True,
        zero_stage=2,
    ),
)
optim = dict(lr=5e-5)
ckpt_every = 200
