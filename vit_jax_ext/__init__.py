"""vit_jax_ext: CrossViT, DeepViT and BOAT in JAX and Flax NNX, with what they are compared with."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from vit_jax_ext.errors import UserError

if TYPE_CHECKING:
  from vit_jax_ext.inputs import class_names, data_config, preprocess
  from vit_jax_ext.models.registry import Variant, create_model, list_models, register_model
  from vit_jax_ext.pretrained import LoadReport, load_pretrained, save_pretrained
  from vit_jax_ext.training.weights import load_run

__all__ = [
  "LoadReport",
  "UserError",
  "Variant",
  "class_names",
  "create_model",
  "data_config",
  "list_models",
  "load_pretrained",
  "load_run",
  "preprocess",
  "register_model",
  "save_pretrained",
]

# Imported when asked for: `python main.py --help` shall not wait for JAX.
_HOMES = {
  "LoadReport": "pretrained",
  "Variant": "models.registry",
  "class_names": "inputs",
  "create_model": "models.registry",
  "data_config": "inputs",
  "list_models": "models.registry",
  "load_pretrained": "pretrained",
  "load_run": "training.weights",
  "preprocess": "inputs",
  "register_model": "models.registry",
  "save_pretrained": "pretrained",
}


def __getattr__(name: str) -> Any:
  if name == "__version__":
    from importlib import metadata  # which takes as long as all the rest here

    value = metadata.version(__name__)
  elif name in _HOMES:
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  elif importlib.util.find_spec(f"{__name__}.{name}"):
    value = importlib.import_module(f"{__name__}.{name}")
  else:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
