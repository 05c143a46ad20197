"""Samples of the shapes world in four steps, from the demo's weights and the adapters of its distillation.

python scripts/diffusion/inference.py configs/diffusion/inference/demo_distill.py --prompt "a red circle moving left"
"""

_base_ = ["demo.py"]

lora_checkpoint = "outputs/demo_distill/train"
save_dir = "outputs/demo_distill/samples"
sampler = "few_step"
few_step_times = [1.0, 0.98, 0.95, 0.87]
num_steps = 4
guidance = 1.0
