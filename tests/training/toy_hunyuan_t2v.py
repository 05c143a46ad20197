"""HunyuanVideo of a few thousand weights on clips without files, text to video; what tests of the loop train."""

_base_ = ["toy_config.py"]

model = dict(
    _delete_=True,
    type="hunyuan_video",
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    in_channels=12,
    rope_axes_dim=(4, 4, 4),
    text_dim=16,
    pooled_dim=16,
)
encoders = dict(
    text=dict(
        _delete_=True,
        type="llm",
        max_length=24,
        dtype="fp32",
        tiny=dict(hidden_size=16, num_layers=3, num_heads=2),
    ),
)
condition_config = dict(_delete_=True, t2v=1.0)
scheduler = dict(type="flow_matching", t_distribution="uniform", shift=7.0)
bucket_config = {"_delete_": True, "8px_ar1:1": {1: (1.0, 2), 9: (1.0, 2)}}
guidance = 6.0
exp_name = "toy_hunyuan_t2v"
