"""BatchNorm as torch has it, also over parts of the batch, as several GPUs have it that do not synchronise."""

from flax import nnx
import jax
import jax.numpy as jnp

from vit_jax_ext.errors import UserError
from vit_jax_ext.models.attention import widest

DECAY = 0.9  # of the running averages: torch's momentum of 0.1


class BatchNorm(nnx.BatchNorm):
  """torch's BatchNorm in at least float32, with momentum 0.1, which is a decay of 0.9.

  In training each group of `statistics_batch` images is normalised by its own mean and variance, as it is on one GPU
  without synchronisation. The running averages follow the first group, as those of the process that saves checkpoints
  do. The variance is taken around the mean (one pass over x and x**2 loses it where it is small beside the mean's
  square: attention maps have 1e-5), and its running average is the unbiased one.

  Args:
    num_features: size of the axis `axis`.
    statistics_batch: images of a group; None for the whole batch.

  Raises:
    UserError: groups that do not make up the batch, when it is called.
  """

  def __init__(self, num_features: int, *, axis: int = -1, statistics_batch: int | None, dtype: jnp.dtype, **kw):
    dtype = widest(dtype)
    super().__init__(num_features, axis=axis, momentum=DECAY, epsilon=1e-5, dtype=dtype, **kw)
    # nnx would keep float32 statistics of float64 maps.
    self.mean, self.var = (nnx.BatchStat(stat[...].astype(dtype)) for stat in (self.mean, self.var))
    self.statistics_batch = statistics_batch

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Normalises (B, ...) by its own statistics in training, by the running averages otherwise."""
    shape = [1] * x.ndim
    shape[self.axis] = self.num_features
    scale, bias = (param[...].astype(self.dtype).reshape(shape) for param in (self.scale, self.bias))
    x = x.astype(self.dtype)
    if not train:
      mean, var = (stat[...].reshape(shape) for stat in (self.mean, self.var))
      return (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias

    groups = x.reshape(-1, self.group_size(len(x)), *x.shape[1:])
    axes = [axis for axis in range(1, groups.ndim) if axis != 1 + self.axis % x.ndim]
    mean = groups.mean(axes, keepdims=True)
    var = jnp.square(groups - mean).mean(axes, keepdims=True)
    self.update(mean[0].reshape(-1), var[0].reshape(-1), groups[0].size // self.num_features)
    y = (groups - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale)
    return y.reshape(x.shape) + bias

  def group_size(self, images: int) -> int:
    """Returns of how many images together statistics are taken.

    Raises:
      UserError: it does not divide the batch.
    """
    if self.statistics_batch and images % self.statistics_batch:
      raise UserError(
        f"statistics_batch {self.statistics_batch} does not divide the {images} images of a batch; choose a divisor"
      )
    return self.statistics_batch or images

  def update(self, mean: jax.Array, var: jax.Array, number: int) -> None:
    """Moves the running averages towards mean and variance (num_features,) of `number` values each."""
    for average, value in ((self.mean, mean), (self.var, var * (number / (number - 1)))):
      average[...] = self.momentum * average[...] + (1 - self.momentum) * jax.lax.stop_gradient(value)
