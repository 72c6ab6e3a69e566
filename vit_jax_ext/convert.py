"""The convert command: weights of any known format to a file of the authors' names and layouts."""

from collections.abc import Sequence
import dataclasses
import os

from flax import nnx
import ml_collections
import rich.console
import rich.table

from vit_jax_ext import config as configs
from vit_jax_ext.errors import UserError
from vit_jax_ext.models import registry
from vit_jax_ext.pretrained import LoadReport, load_pretrained, read_source, save_pretrained


def convert(
  source: str, target: str, name: str | None, num_classes: int | None, overrides: Sequence[str]
) -> LoadReport:
  """Loads weights, writes them, and prints what happened to every array as a table.

  Args:
    source: see `load_pretrained`; "True" for the published weights.
    target: see `save_pretrained`.
    name: the variant; None for that of the run `source`.
    num_classes: None for what the weights have.
    overrides: KEY=VALUE of model.overrides, such as model.overrides.image_size=384.

  Raises:
    UserError: what `load_pretrained` and `save_pretrained` refuse, or a source that does not tell its model.
  """
  if name:
    registry.get_variant(name)
    config = ml_collections.ConfigDict({"model": {"name": name, "overrides": {}}})
  elif os.path.isdir(source):
    config = configs.read_workdir_config(source)
  else:
    raise UserError(f"weights {source} do not tell their model; name it with --model=NAME")
  configs.override(config, overrides)
  spec = config.model
  weights, where = read_source(source == "True" or source, spec.name)
  saved_classes = len(weights.get("head.bias", weights.get("head.0.bias", ())))
  if num_classes in (None, saved_classes):
    model = registry.abstract_model(spec, saved_classes)
  else:  # a new classifier needs initial values
    model = registry.create_model(spec.name, num_classes=num_classes, rngs=nnx.Rngs(0), **spec.overrides)
  report = dataclasses.replace(load_pretrained(model, weights), source=where)
  save_pretrained(model, target)

  table = rich.table.Table("", "arrays", "names")
  table.add_row("loaded", str(len(report.loaded)), "")
  for outcome in ("resized", "reinitialized", "unused"):
    names = getattr(report, outcome)
    table.add_row(outcome, str(len(names)), "\n".join(names))
  rich.console.Console(width=120).print(table)
  print(f"wrote {target}: {spec.name} from {where}")
  return report
