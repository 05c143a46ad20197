"""How the experts of Wan 2.2 are distilled into four steps with adapters; numbers of VideoX-Fun's recipe.

The negative prompt is that of Wan, in the English of diffusers' examples; Wan publishes it in Chinese.
"""

distill = dict(
    times=(1.0, 0.75, 0.5, 0.25),
    gen_update_interval=5,
    real_guidance=6.0,
    fake_guidance=0.0,
    critic_lr=1e-6,
    negative_prompt=(
        "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
        "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly "
        "drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy "
        "background, three legs, many people in the background, walking backwards"
    ),
)
lora_config = dict(r=64, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "ffn.net.0.proj", "ffn.net.2"])
