"""What a run leaves in its workdir: config, checkpoints with their digests, metrics."""

CONFIG = "config.json"  # its config, by which a folder is known as a workdir
