"""Every key of a config: what it may be, and what it means. The command line, train, doctor, --help and docs use it.

configs/common.py has the defaults. What depends on the dataset or on the devices is checked where they are known.
"""

from collections.abc import Mapping
import difflib
from typing import Any, NamedTuple

from vit_jax_ext.errors import UserError
from vit_jax_ext.rules import NOT_NEGATIVE, POSITIVE, RATE, SHARE, SWITCH, TEXT, Rule, integer


class Key(NamedTuple):
  """What a value may be, and what it means."""

  rule: Rule
  meaning: str


KEYS = {
  "seed": Key(integer(0), "of initial weights, order and augmentation"),
  "batch_size": Key(integer(1), "images of a step, over all devices of all hosts"),
  "total_steps": Key(integer(1, optional=True), "how long; None where total_epochs says it"),
  "total_epochs": Key(Rule(above=0, most=1e6, optional=True), "how long; None where total_steps says it"),
  "model.name": Key(TEXT, "one of vit_jax_ext.list_models()"),
  "pretrained": Key(
    Rule(object, optional=True), "weights: a file, a run's workdir, True for the published ones, None for random ones"
  ),
  "dataset.name": Key(TEXT, "of TFDS, or a folder of images by class or with labels.csv, written with a slash"),
  "dataset.data_dir": Key(Rule(str, optional=True), "of TFDS; None: ~/tensorflow_datasets"),
  "dataset.train_split": Key(TEXT, "such as train or train[:90%]"),
  "dataset.eval_split": Key(TEXT, "such as validation, test or train[90%:]"),
  "dataset.shuffle_buffer": Key(
    integer(1), "examples among which the next one is drawn, where TFRecord files are read in their order"
  ),
  "dataset.crop": Key(
    Rule(least=0.1, most=1, optional=True), "share of a side that evaluation sees; None: as published"
  ),
  "dataset.shift": Key(SHARE, "augmentation: largest displacement, as a share of a side"),
  "dataset.scale": Key(RATE, "augmentation: largest change of size"),
  "dataset.max_unreadable": Key(SHARE, "share of the images; more that cannot be decoded end the run"),
  "augment.crop_scale": Key(
    Rule(above=0, most=1, nesting=1, length=2, empty=True), "of the area that a random crop has; (): whole images"
  ),
  "augment.dct_scaling": Key(SWITCH, "scale crops of twice the model's size while they are decoded: faster, softer"),
  "augment.interpolation": Key(Rule(str, choices=("bicubic", "bilinear", "random")), "random: drawn for each image"),
  "augment.flip": Key(SHARE, "probability of mirroring"),
  "augment.randaugment": Key(Rule(str, empty=True), "timm's name, such as rand-m9-mstd0.5-inc1; empty: off"),
  "augment.color_jitter": Key(SHARE, "of brightness, contrast and saturation"),
  # An epoch has as many steps as without, in whole batches, and so a part of the images, drawn anew each time.
  "augment.repeats": Key(integer(1), "how often an image comes in an epoch, differently augmented (DeiT's RASampler)"),
  "augment.mixup": Key(Rule(least=0, most=1000), "alpha of its Beta distribution; 0: off"),
  "augment.cutmix": Key(Rule(least=0, most=1000), "alpha of its Beta distribution; 0: off"),
  "augment.switch_probability": Key(SHARE, "of cutmix instead of mixup, where both are on"),
  "augment.mixing_batch": Key(integer(1, optional=True), "images that one draw mixes; None: the whole batch"),
  "augment.erasing": Key(SHARE, "probability of random erasing"),
  "augment.erase_mixed": Key(SWITCH, "erase after mixing, not before"),
  "optimizer.learning_rate": Key(POSITIVE, "its peak"),
  "optimizer.initial_learning_rate": Key(NOT_NEGATIVE, "where the warm-up begins"),
  "optimizer.final_learning_rate": Key(NOT_NEGATIVE, "where the cosine ends"),
  "optimizer.warmup_steps": Key(integer(0), "of a linear warm-up"),
  "optimizer.warmup_epochs": Key(Rule(least=0, most=1e6), "besides warmup_steps"),
  "optimizer.warmup_prefix": Key(SWITCH, "the cosine begins after the warm-up; False: under it, from the first step"),
  "optimizer.cooldown_epochs": Key(Rule(least=0, most=1e6), "the last ones, at the final learning rate"),
  "optimizer.per_epoch": Key(SWITCH, "the learning rate changes between epochs only"),
  "optimizer.epochs_behind": Key(integer(0), "with per_epoch: epoch e has the learning rate of epoch e - this"),
  "optimizer.weight_decay": Key(Rule(least=0, most=1000), "AdamW's, times the learning rate"),
  "optimizer.clip_norm": Key(Rule(above=0, optional=True), "largest norm of the gradients; None: any"),
  "optimizer.accumulation_steps": Key(integer(1), "parts of a batch, one after another"),
  "optimizer.layer_decay": Key(Rule(above=0, most=1), "factor of the learning rate from each layer to the one before"),
  "linear_probe": Key(SWITCH, "train the classifier alone"),
  "label_smoothing": Key(RATE, "share of the target that is spread over all classes; of several labels: that is 1/2"),
  "cosine_regularizer.weight": Key(NOT_NEGATIVE, "of the similarity of neighbouring blocks' attention maps"),
  "cosine_regularizer.blocks": Key(integer(0, nesting=1, empty=True), "block i is compared with i + 1"),
  "ema_decay": Key(RATE, "of the averaged weights; 0: none"),
  "skip_nonfinite": Key(SWITCH, "leave out updates whose loss or gradients are not finite, instead of stopping"),
  "log_every_steps": Key(integer(1), "training metrics"),
  "eval_every_steps": Key(integer(1), "evaluation, which also saves"),
  "checkpoint.every_steps": Key(integer(1), "besides one at every evaluation"),
  "checkpoint.keep_last": Key(integer(1), "besides the best"),
  "tracker": Key(
    Rule(str, choices=("wandb", "mlflow"), optional=True),
    "gets the metrics too; None: TensorBoard and metrics.jsonl alone",
  ),
  "compilation_cache": Key(
    Rule(str, optional=True, empty=True),
    "folder of compiled programs, for the next start; auto: under the user's cache; None or empty: none",
  ),
  "mesh.data": Key(integer(-1), "devices along which the batch is divided; -1: what the others leave"),
  "mesh.fsdp": Key(integer(-1), "along which parameters are divided too; -1: what the others leave"),
  "mesh.model": Key(integer(-1), "along which layers are divided; -1: what the others leave"),
  "smoke": Key(SWITCH, "try the config: sets what stands below when_smoke, two steps and an evaluation"),
}
OPTIONS = "model.overrides."  # keyword arguments of create_model, which checks them
SMOKE = "when_smoke."
_OTHER_NAMES = {"wd": "optimizer.weight_decay", "epochs": "total_epochs", "steps": "total_steps"}


def is_known(key: str) -> bool:
  """Tells whether a config may have a key; what `create_model` takes and a smoke run changes are trees of their own."""
  return key in KEYS or key.startswith((OPTIONS, SMOKE)) or key in (OPTIONS[:-1], SMOKE[:-1])


def unknown_key(key: str) -> UserError:
  """Returns the error about a key that is unknown, which names the nearest ones."""
  leaf = key.rpartition(".")[2]

  def likeness(known: str) -> float:
    other = known.rpartition(".")[2]
    initials = "".join(word[0] for word in other.split("_"))
    alike = difflib.SequenceMatcher(None, leaf, other).ratio(), difflib.SequenceMatcher(None, key, known).ratio()
    same = leaf == initials and len(leaf) > 1
    return 2 * (same or _OTHER_NAMES.get(leaf) == known) + max(alike)

  nearest = sorted(KEYS, key=likeness, reverse=True)
  return UserError(f"config key {key!r} is unknown; did you mean {', '.join(nearest[:3])}?")


def check_values(values: Mapping[str, Any]) -> None:
  """Checks the values of a config by their keys, joined with dots: each by itself, and those that depend on each other.

  Raises:
    UserError: a key is unknown, or a value does not fit.
  """
  for key, value in values.items():
    if not is_known(key):
      raise unknown_key(key)
    bare = key.removeprefix(SMOKE)
    if bare in KEYS:
      KEYS[bare].rule.check(f"config.{key}=", value, KEYS[bare].meaning)
  for key in KEYS:
    if key not in values:
      raise UserError(f"the config has no {key}: {KEYS[key].meaning}; begin it with configs/common.py's base_config()")
  for option in ("num_classes", "rngs"):
    if OPTIONS + option in values:
      raise UserError(f"config.{OPTIONS}{option}={values[OPTIONS + option]} is not to be set; dataset and seed say it")
  check_length(values["total_steps"], values["total_epochs"])
  low, *high = values["augment.crop_scale"] or (0, 0)
  if low > high[0]:
    raise UserError(
      f"config.augment.crop_scale=({low}, {high[0]}) has the larger bound first; give the smaller one first"
    )
  if values["cosine_regularizer.weight"] and not values["cosine_regularizer.blocks"]:
    raise UserError(
      f"config.cosine_regularizer.weight={values['cosine_regularizer.weight']} without blocks; name them with "
      "--config.cosine_regularizer.blocks='(0,1)', or give weight 0"
    )
  rest = [f"config.mesh.{axis}=-1" for axis in ("data", "fsdp", "model") if values[f"mesh.{axis}"] == -1]
  if len(rest) > 1:
    raise UserError(f"{' and '.join(rest)} cannot both be what the others leave; give the sizes of all axes but one")


def check_length(steps: int | None, epochs: float | None) -> None:
  """Raises UserError unless one of total_steps and total_epochs is given."""
  if (steps is None) == (epochs is None):
    raise UserError(f"config.total_steps={steps} and config.total_epochs={epochs}: give one of them")


def describe() -> str:
  """Returns all keys for people."""
  return "\n".join(f"  {name}  {key.rule}\n      {key.meaning}" for name, key in KEYS.items())
