"""Multi-head attention: one function for all architectures, and what each platform does it with.

Queries, keys and values are (..., tokens, C) as the projections give them, the heads side by side in C. Axes before the
tokens are images, or images and windows. Maps are (..., heads, queries, keys).
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from vit_jax_ext.errors import UserError
from vit_jax_ext.models.fused_attention import fused_attention, packed_attention
from vit_jax_ext.models.fused_reattention import covariance_sums, mix_heads
from vit_jax_ext.models.kernels import tiled_bytes, unpack, vmem_bytes

# pallas: kernels that keep the maps on the chip (fused_attention); cudnn: NVIDIA's; half: XLA, logits and maps in
# memory in half precision, as torch's autocast has its products; reference: XLA, in float32.
IMPLEMENTATIONS = ("auto", "reference", "pallas", "cudnn", "half")
# Maps on the chip, float32.
MAPS_AT_WORK = 14  # while a program works on a head
REATTENTION_MAPS = 2  # of each head that it holds besides


def widest(dtype: jnp.dtype) -> jnp.dtype:
  """Returns float32, or what is wider."""
  return jnp.promote_types(dtype, jnp.float32)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
  """(..., tokens, C) to (..., tokens, heads, C / heads)."""
  return x.reshape(*x.shape[:-1], num_heads, -1)


def softmax_attention(
  q: jax.Array, k: jax.Array, *, num_heads: int, scale: float, bias: jax.Array | None = None,
  mask: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
  """Returns softmax(scale * q k^T + bias + mask), at least float32; see `attend` for the arguments."""
  return jax.nn.softmax(_logits(q, k, num_heads, scale, bias, mask, widest(q.dtype)), axis=-1)


def _logits(q, k, num_heads, scale, bias, mask, product_dtype):
  q, k = split_heads(q, num_heads), split_heads(k, num_heads)
  logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=product_dtype)
  logits = logits.astype(widest(logits.dtype)) * scale
  if bias is not None:
    logits += bias
  if mask is not None:
    logits += mask[:, None]
  return logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rounded_softmax(logits: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns the softmax of float32 `logits` over the last axis, rounded to `dtype`: all that the backward pass keeps.

  So the compiler can make the logits where it uses them up, and float32 is never in memory.
  """
  return jax.nn.softmax(logits, axis=-1).astype(dtype)


def _rounded_softmax_forward(logits, dtype):
  attn = rounded_softmax(logits, dtype)
  return attn, attn


def _rounded_softmax_backward(_, attn, grad):
  wide, grad = attn.astype(jnp.float32), grad.astype(jnp.float32)
  grad = (wide * (grad - (grad * wide).sum(axis=-1, keepdims=True))).astype(attn.dtype)
  # Else the compiler would have it in float32, for the gradient of a bias.
  return (jax.lax.optimization_barrier(grad).astype(jnp.float32),)


rounded_softmax.defvjp(_rounded_softmax_forward, _rounded_softmax_backward)


def weigh(attn: jax.Array, v: jax.Array) -> jax.Array:
  """Returns the values (..., keys, C) mixed by the maps `attn` (..., heads, queries, keys): (..., queries, C)."""
  y = jnp.einsum("...hqk,...khd->...qhd", attn.astype(v.dtype), split_heads(v, attn.shape[-3]))
  return y.reshape(*y.shape[:-2], -1)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  num_heads: int,
  scale: float,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  drop: Callable[[jax.Array], jax.Array] | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Multi-head attention, softmax(scale * q k^T + bias + mask) v.

  The maps are computed beside the result where that does not need them. The compiler then drops them, unless they are
  read.

  Args:
    q, k, v: (..., tokens, C).
    num_heads, scale: heads; factor of the logits.
    bias: (heads, queries, keys), the same for all windows, or None.
    mask: (windows, queries, keys), 0 or -inf, the same for all heads, or None; has no gradient.
    drop: dropout of the maps, which the kernels do not know; None for none.
    implementation: one of IMPLEMENTATIONS. auto: pallas on TPUs, cudnn on NVIDIA GPUs where there is no bias or mask,
      half there for what it does not take, and the reference elsewhere and for what these do not take.

  Returns:
    y: (..., queries, C).
    attn: the maps before dropout, at least float32, (..., heads, queries, keys).

  Raises:
    UserError: the implementation does not take this; says why.
  """
  obstacles = _obstacles(q, k, num_heads, drop)
  if implementation == "auto" and not (bias is None and mask is None):
    obstacles["cudnn"] = "its support for biases hangs on shapes and versions"
  implementation = _choose(implementation, obstacles)
  attn = softmax_attention(q, k, num_heads=num_heads, scale=scale, bias=bias, mask=mask)
  if implementation in ("reference", "half"):
    used = attn
    if implementation == "half":
      used = rounded_softmax(_logits(q, k, num_heads, scale, bias, mask, q.dtype), q.dtype)
    return weigh(used if drop is None else drop(used), v), attn
  function = _pallas if implementation == "pallas" else _cudnn
  return function(q, k, v, bias, mask, num_heads, scale), attn


def attend_packed(qkv: jax.Array, *, num_heads: int, scale: float) -> tuple[jax.Array, jax.Array]:
  """Does what `attend` does where `is_fused`, of whole images and without bias.

  Args:
    qkv: queries, keys and values (B, tokens, 3 C), as `kernels.pack` orders them, where `kernels.can_pack`.
    num_heads, scale: see `attend`.
  """
  q, k, _ = jnp.split(unpack(qkv, num_heads), 3, axis=-1)
  attn = softmax_attention(q, k, num_heads=num_heads, scale=scale)
  return packed_attention(qkv[:, None], num_heads, q.shape[-1] // num_heads, scale)[:, 0], attn


def is_fused(
  q: jax.Array,
  k: jax.Array,
  *,
  num_heads: int,
  drop: Callable | None = None,
  implementation: str = "auto",
  held: int = 0,
) -> bool:
  """Returns whether kernels for TPUs do this attention.

  Args:
    q, k, num_heads, drop, implementation: see `attend`.
    held: maps that a kernel holds beside those that it works on.

  Raises:
    UserError: as there.
  """
  return _choose(implementation, _obstacles(q, k, num_heads, drop, held)) == "pallas"


def platform() -> str:
  """Returns what the program that is being traced will run on: cpu, gpu or tpu."""
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.abstract_device is not None:
    return {"cuda": "gpu"}.get(mesh.abstract_device.platform, mesh.abstract_device.platform)
  device = jax.config.jax_default_device
  return getattr(device, "platform", device) or jax.default_backend()


def map_covariance(
  q: jax.Array, k: jax.Array, *, num_heads: int, scale: float, images: int, implementation: str = "auto"
) -> jax.Array:
  """Returns the covariance of the heads' maps, softmax(scale * q k^T), over groups of images, queries and keys.

  The mean of a map is 1 / keys, as its rows sum to 1; the variance of any mixture of heads follows from this.

  Args:
    q, k: (B, tokens, C).
    num_heads, scale, implementation: see `attend`; all but pallas are the reference.
    images: of a group, which divides B.

  Returns:
    (B / images, heads, heads), at least float32.
  """
  if is_fused(q, k, num_heads=num_heads, implementation=implementation, held=REATTENTION_MAPS * num_heads):
    sums = covariance_sums(q[:, None], k[:, None], q.shape[-1] // num_heads, scale)
  else:
    attn = softmax_attention(q, k, num_heads=num_heads, scale=scale) - 1 / k.shape[-2]
    sums = jnp.einsum("bhqk,bgqk->bhg", attn, attn, precision=jax.lax.Precision.HIGHEST)
  sums = sums.reshape(-1, images, num_heads, num_heads).sum(axis=1)
  return sums / (images * q.shape[-2] * k.shape[-2])


def reattend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mixing: jax.Array,
  shift: jax.Array,
  *,
  num_heads: int,
  scale: float,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Attention by maps that are mixed across heads: map g is sum_h mixing_hg (P_h - 1 / keys) + shift_g.

  Args:
    q, k, v: (B, tokens, C).
    mixing: (groups of images, heads, heads), at least float32.
    shift: (groups of images, heads), at least float32.
    num_heads, scale, implementation: of P = softmax(scale * q k^T); see `attend`; all but pallas are the reference.

  Returns:
    y: (B, queries, C).
    attn: the mixed maps, (B, heads, queries, keys), at least float32.
  """
  width, groups = q.shape[-1] // num_heads, len(mixing)
  attn = softmax_attention(q, k, num_heads=num_heads, scale=scale) - 1 / k.shape[-2]
  with jax.named_scope("reatten_matrix"):
    attn = jnp.einsum("gbhqk,ghf->gbfqk", attn.reshape(groups, -1, *attn.shape[1:]), mixing)
  attn = (attn + shift[:, None, :, None, None]).reshape(-1, *attn.shape[2:])
  if not is_fused(q, k, num_heads=num_heads, implementation=implementation, held=REATTENTION_MAPS * num_heads):
    return weigh(attn, v), attn
  t, s = (jnp.repeat(x, len(q) // groups, axis=0) for x in (mixing, jnp.repeat(shift, width, axis=-1)))
  return mix_heads(q[:, None], k[:, None], v[:, None], t, s[:, None], width, scale)[:, 0], attn


def _choose(implementation: str, obstacles: dict[str, str]) -> str:
  """Returns the implementation, auto resolved.

  Raises:
    UserError: it does not work here.
  """
  if implementation == "auto":
    best = ("pallas", "cudnn", *["half"] * (platform() == "gpu"))  # CPUs have no units for half precision
    return next((name for name in best if not obstacles[name]), "reference")
  if obstacles[implementation]:
    able = ", ".join(name for name, obstacle in obstacles.items() if not obstacle)
    raise UserError(
      f"attention={implementation} does not work here: {obstacles[implementation]}; choose auto or {able}"
    )
  return implementation


def _obstacles(q, k, num_heads, drop, held=0) -> dict[str, str]:
  """Returns what keeps each implementation from this attention, if anything."""
  where, width = platform(), q.shape[-1] // num_heads
  pallas = cudnn = "it has no dropout of attention weights" if drop else ""
  if where != "tpu":
    pallas = f"it is for TPUs, not {where}"
  elif not vmem_bytes():
    pallas = "it is for TPU v4 and newer"
  elif q.dtype not in (jnp.bfloat16, jnp.float32):
    pallas = f"it takes bfloat16 and float32, not {q.dtype}"
  elif tiled_bytes((MAPS_AT_WORK + held, q.shape[-2], k.shape[-2]), 4) > vmem_bytes():
    pallas = f"maps of {q.shape[-2]} x {k.shape[-2]} tokens do not fit on the chip"
  if where != "gpu":
    cudnn = f"it is for NVIDIA GPUs, not {where}"
  elif q.dtype not in (jnp.bfloat16, jnp.float16):
    cudnn = f"it takes bfloat16 and float16, not {q.dtype}"
  elif width % 8 or width > 128:
    cudnn = f"it takes heads as wide as a multiple of 8 up to 128, not {width}"
  elif not cudnn:
    cudnn = _cudnn_missing()
  half = "" if q.dtype in (jnp.bfloat16, jnp.float16) else f"it takes bfloat16 and float16, not {q.dtype}"
  return {"reference": "", "pallas": pallas, "cudnn": cudnn, "half": half}


@functools.cache
def _cudnn_missing() -> str:
  """Returns why JAX finds no cuDNN that it can use, as when a program is compiled without a GPU; empty if it does."""
  x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
  try:
    jax.eval_shape(lambda x: jax.nn.dot_product_attention(x, x, x, implementation="cudnn"), x)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    return str(error).strip().splitlines()[0]
  return ""


def _pallas(q, k, v, bias, mask, num_heads, scale):
  windows = [x.reshape(len(x), -1, *x.shape[-2:]) for x in (q, k, v)]
  if bias is not None:
    bias = bias.astype(jnp.float32)
  y = fused_attention(*windows, bias, mask, q.shape[-1] // num_heads, scale)
  return y.reshape(q.shape)


def _cudnn(q, k, v, bias, mask, num_heads, scale):
  windows = q.shape[1] if q.ndim == 4 else 1
  heads = [split_heads(x.reshape(-1, *x.shape[-2:]), num_heads) for x in (q, k, v)]
  if bias is not None:
    bias = bias[None]
  if mask is not None:
    both = mask[:, None] if bias is None else bias + mask[:, None]
    bias = jnp.broadcast_to(both, (len(q), *both.shape)).reshape(len(q) * windows, *both.shape[1:])
  # JAX's gradient refuses odd numbers of tokens, such as 196 patches and a class token: they get one that nobody sees.
  odd, lengths = (q.shape[-2] % 2, k.shape[-2] % 2), {}
  if any(odd):
    heads = [jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in heads]
    lengths["query_seq_lengths"] = jnp.full(len(heads[0]), q.shape[-2], jnp.int32)
    lengths["key_value_seq_lengths"] = jnp.full(len(heads[0]), k.shape[-2], jnp.int32)
  if bias is not None:
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, odd[0]), (0, odd[1]))).astype(q.dtype)
  y = jax.nn.dot_product_attention(*heads, bias, scale=scale, implementation="cudnn", **lengths)
  return y[:, : q.shape[-2]].reshape(q.shape)
