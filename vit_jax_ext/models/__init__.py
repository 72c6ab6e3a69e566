"""The architectures: pure JAX and Flax NNX, one file per paper, and what they share."""
