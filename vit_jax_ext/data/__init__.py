"""Input pipelines; TensorFlow lives here and nowhere else."""
