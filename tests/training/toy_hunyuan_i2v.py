"""The same with a given first frame, which LLaVA sees with the caption."""

_base_ = ["toy_hunyuan_t2v.py"]

model = dict(token_replace=True)
encoders = dict(text=dict(type="llava"))
condition_config = dict(_delete_=True, i2v_head=1.0)
bucket_config = {"_delete_": True, "8px_ar1:1": {9: (1.0, 2)}}
no_i2v_ref_loss = True
exp_name = "toy_hunyuan_i2v"
