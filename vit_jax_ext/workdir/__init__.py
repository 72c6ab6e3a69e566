"""What a run leaves in its workdir: config, checkpoints with their digests, metrics."""
