"""Samples of the speech world: a first frame that grows and shrinks with a sound.

python scripts/diffusion/inference.py configs/diffusion/inference/demo_speech.py --prompt "a red circle" \
    --ref frame.png --audio sound.wav
"""

_base_ = ["../../_base_/speech_world_model.py", "../../_base_/shapes_sampling.py"]

ckpt_path = "outputs/demo_speech/train"
save_dir = "outputs/demo_speech/samples"
height = 16
width = 16
num_frames = 17
num_steps = 20
cond_type = "i2v_head"
guidance = 1.0
guidance_img = 1.0
audio_guidance = 1.0
image_osci = False
scale_temporal_osci = False
num_sample = 1
batch_size = 32
