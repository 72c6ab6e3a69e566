"""What a config describes, before anything is allocated: model, optimizer, mesh and the compiled functions over them.

Imports no TensorFlow: the dataset counts as two numbers.
"""

from collections.abc import Sequence
import functools

from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import optax

from vit_jax_ext import config as configs
from vit_jax_ext import config_keys
from vit_jax_ext.errors import UserError
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.rules import LARGEST
from vit_jax_ext.training import mixup, optimizer, sharding
from vit_jax_ext.training.losses import Loss, attention_cosine_loss, make_loss
from vit_jax_ext.training.partition import Layout
from vit_jax_ext.training.train_step import TrainState, init_state, make_train_step

SHORT_RUN_SHARE = 0.1  # of a run that is too short for its warm-up and cool-down: what they then have together


def epoch_in_steps(config: ml_collections.ConfigDict, examples: int) -> float:
  """Returns how long an epoch is: whole with repeated augmentation, see `input_pipeline.train_batches`."""
  if config.augment.repeats == 1:
    return examples / config.batch_size
  return max(1, examples // config.batch_size)


def number_of_steps(config: ml_collections.ConfigDict, examples: int) -> int:
  """Returns `total_steps`, or `total_epochs` in steps.

  Raises:
    UserError: neither or both are given, or the epochs are no step, or too many.
  """
  config_keys.check_length(config.total_steps, config.total_epochs)
  steps = config.total_steps or round(config.total_epochs * epoch_in_steps(config, examples))
  if not 0 < steps <= LARGEST:
    raise UserError(
      f"config.total_epochs={config.total_epochs} are {steps} steps of {config.batch_size} images; give another number"
    )
  return steps


def learning_rate_schedule(config: ml_collections.ConfigDict, examples: int) -> optax.Schedule:
  """Returns the learning rate by step; epochs are passes over `examples` images.

  A warm-up and cool-down that leave no step between them are scaled, and the log says so.
  """
  steps_per_epoch, total_steps = epoch_in_steps(config, examples), number_of_steps(config, examples)
  warmup = config.optimizer.warmup_steps + round(config.optimizer.warmup_epochs * steps_per_epoch)
  cooldown = round(config.optimizer.cooldown_epochs * steps_per_epoch)
  if warmup + cooldown >= total_steps:
    asked, room = (warmup, cooldown), total_steps * SHORT_RUN_SHARE / (warmup + cooldown)
    warmup, cooldown = int(warmup * room), int(cooldown * room)
    logging.warning(
      "warm-up and cool-down of %d and %d steps do not fit into %d steps; they are scaled to %d and %d",
      *asked, total_steps, warmup, cooldown,
    )  # fmt: skip
  return optimizer.learning_rate_schedule(
    peak=config.optimizer.learning_rate,
    initial=config.optimizer.initial_learning_rate,
    floor=config.optimizer.final_learning_rate,
    warmup_steps=warmup,
    total_steps=total_steps,
    cooldown_steps=cooldown,
    warmup_prefix=config.optimizer.warmup_prefix,
    steps_per_epoch=steps_per_epoch if config.optimizer.per_epoch else None,
    epochs_behind=config.optimizer.epochs_behind,
  )


class Experiment:
  """The parts of a training run.

  Args:
    config: see configs/common.py.
    num_classes, examples, multi_label: of the training split.
    devices: that the functions are compiled for; all of all hosts by default.

  Attributes:
    num_classes, multi_label: as given.
    total_steps: of the training.
    mesh: over the devices.
    by_batch: sharding of the batches.
    variant: published facts of the model.
    model: abstract.
    layout: where the model's arrays lie on the mesh.
    places: shardings of the TrainState.
    schedule: learning rate by step.
    init: compiled, () -> TrainState, created where it will lie.
    train_step: compiled, (state, batch) -> (state, metrics), which consumes the state.

  Raises:
    UserError: whatever does not fit together.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    num_classes: int,
    examples: int,
    multi_label: bool = False,
    *,
    devices: Sequence[jax.Device] | None = None,
  ):
    configs.check(config)
    if num_classes < 2 and not multi_label:
      raise UserError(f"the dataset has {num_classes} class, and nothing to tell apart; give one with two or more")
    self.num_classes, self.multi_label = num_classes, multi_label
    self.total_steps = number_of_steps(config, examples)
    self.mesh = sharding.make_mesh(config.mesh, devices)
    self.by_batch = sharding.batch_sharding(self.mesh)
    sharding.check_batch_size("batch_size", config.batch_size, self.mesh, config.optimizer.accumulation_steps)
    for name, group in (
      ("augment.mixing_batch", config.augment.mixing_batch),
      ("model.overrides.statistics_batch", config.model.overrides.get("statistics_batch")),
    ):
      sharding.check_group(name, group, config.batch_size // config.optimizer.accumulation_steps, self.mesh)
    self.variant = registry.get_variant(config.model.name)

    def create_model(seed: int) -> nnx.Module:
      return registry.create_model(
        config.model.name, num_classes=num_classes, rngs=nnx.Rngs(jax.random.key(seed)), **config.model.overrides
      )

    self.model = nnx.eval_shape(lambda: create_model(config.seed))
    regularizer = config.cosine_regularizer
    if regularizer.weight:  # a model without attention maps is refused now, not in the first step
      images = jax.ShapeDtypeStruct((1, *self.model.image_size, 3), jnp.float32)
      jax.eval_shape(lambda model, x: attention_cosine_loss(model(x)[1], regularizer.blocks), self.model, images)
    self.schedule = learning_rate_schedule(config, examples)
    tx = optimizer.adamw(
      self.schedule,
      weight_decay=config.optimizer.weight_decay,
      no_decay=self.variant.no_decay,
      clip_norm=config.optimizer.clip_norm,
      layer_decay=config.optimizer.layer_decay,
      linear_probe=config.linear_probe,
    )

    def init(seed: int) -> TrainState:
      return init_state(lambda: create_model(seed), tx, config.ema_decay > 0)

    self.layout = Layout(self.model, self.mesh)
    self.places = self.layout.shardings(jax.eval_shape(init, config.seed))
    # An argument, so that all seeds have one program, which the compilation cache then knows.
    self.init = functools.partial(jax.jit(init, out_shardings=self.places), config.seed)
    step = make_train_step(
      self._make_loss(config),
      tx,
      seed=config.seed,
      ema_decay=config.ema_decay,
      accumulation_steps=config.optimizer.accumulation_steps,
      skip_nonfinite=config.skip_nonfinite,
    )
    self.train_step = jax.jit(
      sharding.traced_on(self.mesh, step),
      in_shardings=(self.places, self.by_batch),
      out_shardings=(self.places, sharding.replicated(self.mesh)),
      donate_argnums=0,
    )

  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of what a training step is given."""
    label = ((batch_size, self.num_classes), jnp.bool) if self.multi_label else ((batch_size,), jnp.int32)
    return {
      "image": jax.ShapeDtypeStruct((batch_size, *self.model.image_size, 3), jnp.uint8),
      "label": jax.ShapeDtypeStruct(*label),
    }

  def _make_loss(self, config: ml_collections.ConfigDict) -> Loss:
    augment = functools.partial(
      mixup.augment,
      num_classes=self.num_classes,
      mixup=config.augment.mixup,
      cutmix=config.augment.cutmix,
      switch_probability=config.augment.switch_probability,
      mixing_batch=config.augment.mixing_batch,
      erasing=config.augment.erasing,
      erase_mixed=config.augment.erase_mixed,
    )
    return make_loss(
      split_model(self.model)[0],
      mean=self.variant.mean,
      std=self.variant.std,
      multi_label=self.multi_label,
      label_smoothing=config.label_smoothing,
      cosine_weight=config.cosine_regularizer.weight,
      cosine_blocks=config.cosine_regularizer.blocks,
      linear_probe=config.linear_probe,
      augment=augment,
      gather=self.layout.gather,
    )
