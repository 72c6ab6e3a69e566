"""Other people's models, which ours are compared with: what they are filled with and called by."""

import importlib.machinery
import sys
from unittest import mock

import numpy as np
import torch


class _Torchvision:
  """Finds mocks for torchvision: models of timm and Transformers need nothing of it, and its wheels do not fit a torch
  for CPUs.
  """

  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] == "torchvision":
      return importlib.machinery.ModuleSpec(name, self, is_package=True)

  def create_module(self, spec):
    return mock.MagicMock(name=spec.name, __path__=[])

  def exec_module(self, module):
    pass


sys.meta_path.insert(0, _Torchvision())


def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Returns the model in float64 and evaluation, with random numbers in every parameter."""
  generator = torch.Generator().manual_seed(seed)
  for parameter in model.double().eval().parameters():
    spread = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
    parameter.data = spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
  return model


def random_images(side: int) -> np.ndarray:
  return np.random.default_rng(0).normal(size=(2, side, side, 3))


def run(model: torch.nn.Module, images: np.ndarray):
  """Calls a model of torch with images (B, H, W, 3)."""
  with torch.no_grad():
    return model(torch.from_numpy(images.transpose(0, 3, 1, 2)))
