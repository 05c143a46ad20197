"""How diffusers' pipelines sample Wan: UniPC at their times, text guidance in every step, 16 frames per second."""

sampler = "unipc"
time_grid = "diffusers"
guidance_img = 1.0
text_osci = False
fps_in_caption = False
fps_save = 16
dtype = "bf16"
save_dir = "samples"
