"""How the shapes world is sampled; the config that inherits names size, checkpoint and folder."""

num_frames = 5
num_steps = 30
guidance = 3.0
text_osci = False
fps_in_caption = False
fps_save = 8
batch_size = 48
overwrite = True
num_sample = 4
dtype = "fp32"
