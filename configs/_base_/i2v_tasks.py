"""Five of eight clips are continued from their first frame; the others from the last, from both, or from text alone."""

condition_config = dict(t2v=1.0, i2v_head=5.0, i2v_loop=1.0, i2v_tail=1.0)
