"""The command line of this folder; where the package is installed, `vit-jax-ext` is the same."""

from vit_jax_ext.__main__ import run

if __name__ == "__main__":
  run()
