"""Tables of clips, the plan of an epoch, and the loader that follows it."""
