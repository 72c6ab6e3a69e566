"""Attention in all its implementations, against plain jnp in float32 and with the kernels interpreted."""

import functools

from flax import nnx
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext.models import attention, fused_depthwise, kernels, layers, swin
from vit_jax_ext.models.fused_attention import fused_attention
from vit_jax_ext.models.fused_reattention import covariance_sums, mix_heads
from vit_jax_ext.models.fused_windows import Windows, attend_packed_stripes, attend_packed_windows, attend_windows


@pytest.fixture(autouse=True)
def interpreted():
  with pltpu.force_tpu_interpret_mode():
    yield


def draw(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def plain_maps(q, k, num_heads, scale, bias=0.0):
  q, k = (x.reshape(*x.shape[:-1], num_heads, -1) for x in (q, k))
  logits = jnp.einsum("...qhd,...khd->...hqk", q, k, precision="highest") * scale + bias
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def plain_weigh(maps, v):
  values = v.reshape(*v.shape[:-1], maps.shape[-3], -1)
  y = jnp.einsum("...hqk,...khd->...qhd", maps, values, precision="highest")
  return y.reshape(*y.shape[:-2], -1)


def check_same(ours, theirs, dy, *arrays):
  """Values and the gradients of all arrays, each function in one program."""

  def values(f):
    y, back = jax.vjp(f, *arrays)
    return y, back(dy)

  found = [jax.jit(functools.partial(values, f))() for f in (ours, theirs)]
  for a, b in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
  ("images", "windows", "queries", "keys", "dim", "heads", "masked"),
  [
    (2, 1, 11, 11, 96, 3, False),
    (1, 4, 9, 9, 64, 4, True),
    (2, 3, 16, 16, 105, 3, True),  # heads of 35, as DeepViT-L's
    (2, 1, 1, 19, 64, 2, False),  # CrossViT's class token
    (1, 2, 10, 10, 256, 2, False),
  ],
)
def test_the_kernel_is_attention(images, windows, queries, keys, dim, heads, masked):
  q, k, v, dy, bias = draw(
    (images, windows, queries, dim), *[(images, windows, keys, dim)] * 2, (images, windows, queries, dim),
    (heads, queries, keys),
  )  # fmt: skip
  mask = jnp.where(draw((windows, queries, keys))[0] + 3 * jnp.eye(queries, keys) < -0.5, -jnp.inf, 0.0)
  mask = mask if masked else None

  def plain(q, k, v, *bias):
    return plain_weigh(plain_maps(q, k, heads, 0.3, bias[0] + mask[:, None] if masked else 0.0), v)

  def fused(q, k, v, *bias):
    return fused_attention(q, k, v, *bias, *[None] * (1 - masked), mask, dim // heads, 0.3)

  check_same(fused, plain, dy, q, k, v, *[bias][: int(masked)])


@pytest.mark.parametrize("number", [1, 3])
def test_the_kernel_is_attention_however_many_heads_are_taken_together(number, monkeypatch):
  asked = []
  jax.clear_caches()  # else what is like another test's kernel is not traced again
  monkeypatch.setattr("vit_jax_ext.models.fused_attention.heads_at_once", lambda *shape: asked.append(shape) or number)
  q, k, v, dy = draw(*[(1, 1, 10, 160)] * 4)  # groups of four heads and of one

  def plain(q, k, v):
    return plain_weigh(plain_maps(q, k, 5, 0.3), v)

  check_same(lambda q, k, v: fused_attention(q, k, v, None, None, 32, 0.3), plain, dy, q, k, v)
  assert set(asked) == {(10, 10)}


def test_the_kernel_is_attention_in_half_precision():
  q, k, v = (x.astype(jnp.bfloat16) for x in draw(*[(1, 1, 40, 64)] * 3))
  y = fused_attention(q, k, v, None, None, 32, 0.3).astype(jnp.float32)
  expected = plain_weigh(plain_maps(*(x.astype(jnp.float32) for x in (q, k)), 2, 0.3), v.astype(jnp.float32))
  np.testing.assert_allclose(y, expected, atol=2**-7 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(("dim", "heads"), [(128, 2), (256, 4), (384, 3)])
def test_one_projection_gives_all_that_the_kernel_reads(dim, heads):
  """Values, maps and the gradients of tokens, kernel and bias."""
  graphdef = nnx.graphdef(layers.PackedQKV(dim, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
  x, kernel, bias, dy, dmaps = draw((2, 7, dim), (dim, 3 * dim), (3 * dim,), (2, 7, dim), (2, heads, 7, 7))

  def plain(x, kernel, bias):
    q, k, v = jnp.split(jnp.dot(x, kernel * dim**-0.5, precision="highest") + bias, 3, axis=-1)
    maps = plain_maps(q, k, heads, 0.3)
    return plain_weigh(maps, v), maps

  def fused(x, kernel, bias):
    layer = nnx.merge(graphdef, dict(kernel=kernel * dim**-0.5, bias=bias))
    return attention.attend_packed(layer.side_by_side(x, heads), num_heads=heads, scale=0.3)

  check_same(fused, plain, (dy, dmaps), x, kernel, bias)


@pytest.mark.parametrize(("dim", "heads", "shards"), [(96, 4, 2), (512, 8, 4), (96, 3, 1)])
def test_each_device_gets_its_heads_as_if_there_were_no_others(dim, heads, shards):
  """`shards` of the 2 or 4 devices of the model axis; three heads are not shared."""
  mesh = jax.sharding.AbstractMesh((2, max(shards, 2)), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
  qkv = draw(*[(2, 5, dim)] * 3)
  with jax.sharding.use_abstract_mesh(mesh):
    packed = kernels.pack(jnp.concatenate(qkv, -1), heads)
    np.testing.assert_array_equal(kernels.unpack(packed, heads), jnp.concatenate(qkv, -1))
    assert kernels.can_pack(dim, heads) == (dim // shards % 128 == 0)
  for i, part in enumerate(jnp.split(packed, shards, -1)):
    own = jnp.concatenate([jnp.split(x, shards, -1)[i] for x in qkv], -1)
    np.testing.assert_array_equal(kernels.pack(own, heads // shards), part)


@pytest.mark.parametrize(("images", "tokens", "dim", "heads"), [(2, 11, 96, 3), (1, 16, 105, 3), (2, 20, 128, 8)])
def test_the_kernels_are_reattention(images, tokens, dim, heads):
  width = dim // heads
  q, k, v, dy = draw(*[(images, 1, tokens, dim)] * 4)
  t, s, weights = draw((images, heads, heads), (images, heads), (images, heads, heads), seed=1)

  def plain(q, k, v, t, s):
    maps = plain_maps(q, k, heads, 0.3)[:, 0] - 1 / tokens
    maps = jnp.einsum("bhqk,bhg->bgqk", maps, t, precision="highest") + s[:, :, None, None]
    return plain_weigh(maps, v[:, 0])[:, None]

  def fused(q, k, v, t, s):
    return mix_heads(q, k, v, t, jnp.repeat(s, width, -1)[:, None], width, 0.3)

  check_same(fused, plain, dy, q, k, v, t, s)

  def plain_covariance(q, k):
    maps = plain_maps(q, k, heads, 0.3)[:, 0] - 1 / tokens
    return jnp.einsum("bhqk,bgqk->bhg", maps, maps, precision="highest")

  check_same(lambda q, k: covariance_sums(q, k, width, 0.3), plain_covariance, weights, q, k)


@pytest.mark.parametrize(
  ("name", "overrides"),
  [
    (
      "crossvit_tiny_224",
      dict(image_size=24, patch_size=(4, 6), embed_dim=(24, 48), num_heads=(3, 3), depth=((1, 1),)),
    ),
    ("deit_tiny_patch16_224", dict(image_size=8, patch_size=4, embed_dim=128, num_heads=2, depth=1)),
    ("deepvit_16b", dict(image_size=16, patch_size=4, embed_dim=24, num_heads=3, depth=2)),
    ("swin_tiny", dict(image_size=16, patch_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4)),
    (
      "swin_tiny",
      dict(image_size=16, patch_size=2, embed_dim=128, depths=(2,), num_heads=(4,), window_size=4, mlp_ratio=1),
    ),
    (
      "boat_swin_tiny",
      dict(
        image_size=16,
        patch_size=2,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 3),
        window_size=4,
        cluster_size=4,
        overlap=2,
      ),
    ),
    ("cswin_tiny", dict(image_size=16, embed_dim=12, depth=(1, 1), num_heads=(2, 4), split_size=(1, 4))),
    ("cswin_tiny", dict(image_size=16, embed_dim=256, depth=(1,), num_heads=(4,), split_size=(2,), mlp_ratio=1)),
  ],
)
def test_a_model_is_the_same_with_kernels(name, overrides, on_tpu):
  """Logits, maps, gradients and new statistics, in training."""
  images, found = draw((2, overrides["image_size"], overrides["image_size"], 3))[0], {}
  for implementation in ("auto", "reference"):
    model = vx.create_model(name, rngs=nnx.Rngs(0), num_classes=5, attention=implementation, **overrides)
    graphdef, *state = nnx.split(model, nnx.Param, nnx.BatchStat)
    state = [nnx.to_pure_dict(part) for part in state]

    @jax.jit
    def step(params, stats, graphdef=graphdef):
      def loss(params, stats):
        model = nnx.merge(graphdef, params, stats)
        logits, out = model(images, train=True)
        return jnp.square(logits).sum(), (logits, out, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

      return jax.grad(loss, has_aux=True)(params, stats)

    lowered = step.lower(*state)
    assert ("callback" in lowered.as_text()) == (implementation == "auto")
    found[implementation] = jax.tree.leaves(lowered.compile()(*state))
  for a, b in zip(*found.values(), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)


@pytest.mark.parametrize("implementation", ["half", "auto"])
@pytest.mark.parametrize(("windows", "masked"), [(1, False), (4, True)])
def test_maps_in_half_precision(windows, masked, implementation, monkeypatch):
  """Values and gradients are within what rounding to bfloat16 makes of them; auto is this on GPUs where a bias is."""
  monkeypatch.setattr(attention, "platform", lambda: "gpu")
  heads, shape = 4, (6, windows, 9, 64) if masked else (6, 9, 64)
  q, k, v, dy = (x.astype(jnp.bfloat16) for x in draw(*[shape] * 4))
  (bias,) = draw((heads, 9, 9), seed=1)
  mask = jnp.where(draw((windows, 9, 9))[0] + 3 * jnp.eye(9) < -0.5, -jnp.inf, 0.0) if masked else None

  def plain(q, k, v, bias):
    added = bias if mask is None else bias + mask[:, None]
    return plain_weigh(plain_maps(*(x.astype(jnp.float32) for x in (q, k)), heads, 0.3, added), v.astype(jnp.float32))

  def half(q, k, v, bias):
    y, attn = attention.attend(q, k, v, num_heads=heads, scale=0.3, bias=bias, mask=mask, implementation=implementation)
    assert y.dtype == q.dtype and attn.dtype == jnp.float32
    return y.astype(jnp.float32)

  def values(f):
    y, back = jax.vjp(f, q, k, v, bias)
    return [y, *back(dy.astype(jnp.float32))]

  found = [jax.jit(functools.partial(values, f))() for f in (half, plain)]
  for a, b in zip(*found, strict=True):
    a, b = (x.astype(jnp.float32) for x in (a, b))
    assert jnp.linalg.norm(a - b) < 0.01 * jnp.linalg.norm(b)


@pytest.mark.parametrize(
  ("windows", "queries", "keys", "biased"), [(0, 12, 12, False), (0, 9, 9, False), (0, 1, 10, False), (4, 9, 9, True)]
)
def test_cudnn_gets_even_numbers_of_tokens(windows, queries, keys, biased, monkeypatch):
  """JAX refuses to differentiate others. Its own implementation of the same function stands in for cuDNN."""
  function, shapes = jax.nn.dot_product_attention, []

  def stand_in(q, k, v, bias, *, implementation, **kw):
    assert implementation == "cudnn"
    shapes.extend([q.shape[1], k.shape[1]])
    return function(q, k, v, bias, implementation="xla", **kw)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  monkeypatch.setattr(attention, "_obstacles", lambda *_: dict.fromkeys(attention.IMPLEMENTATIONS, ""))
  axes = (2, windows) if windows else (2,)
  q, k, v, dy = draw(*[(*axes, n, 32) for n in (queries, keys, keys, queries)])
  (bias,) = draw((4, queries, keys), seed=1)
  mask = jnp.where(draw((windows, queries, keys))[0] < -1, -1e9, 0.0) if windows else None

  def cudnn(q, k, v, *bias):
    bias = bias[0] if bias else None
    return attention.attend(q, k, v, num_heads=4, scale=0.3, bias=bias, mask=mask, implementation="cudnn")[0]

  def plain(q, k, v, *bias):
    return plain_weigh(plain_maps(q, k, 4, 0.3, bias[0] + mask[:, None] if biased else 0.0), v)

  check_same(cudnn, plain, dy, q, k, v, *[bias][: int(biased)])
  assert shapes and not any(n % 2 for n in shapes)


def test_what_an_implementation_does_not_take_is_named(monkeypatch):
  q = jnp.ones((1, 4, 6), jnp.float32)
  kw = dict(num_heads=2, scale=1.0)
  with pytest.raises(vx.UserError, match=r"attention=pallas .*it is for TPUs, not cpu; choose auto or reference"):
    attention.attend(q, q, q, implementation="pallas", **kw)
  monkeypatch.setattr(attention, "platform", lambda: "gpu")
  with pytest.raises(vx.UserError, match=r"attention=cudnn .*bfloat16 and float16, not float32; choose auto or r"):
    attention.attend(q, q, q, implementation="cudnn", **kw)
  q = q.astype(jnp.bfloat16)
  with pytest.raises(vx.UserError, match="multiple of 8 up to 128, not 3"):
    attention.attend(q, q, q, implementation="cudnn", **kw)
  monkeypatch.setattr(attention, "_cudnn_missing", lambda: "no cuDNN")
  q = jnp.ones((1, 4, 16), jnp.bfloat16)
  with pytest.raises(vx.UserError, match=r"attention=cudnn .*: no cuDNN; choose auto or reference, half"):
    attention.attend(q, q, q, implementation="cudnn", **kw)
  y, _ = attention.attend(q, q, q, **kw)  # so auto is half
  np.testing.assert_array_equal(y, q)
  with pytest.raises(vx.UserError, match="'flash' is unknown; choose one of auto, reference, pallas, cudnn, half"):
    vx.create_model("deit_tiny_patch16_224", rngs=nnx.Rngs(0), attention="flash")


@pytest.mark.parametrize("stripe", [None, (2, 3), (6, 1)])
@pytest.mark.parametrize("shape", [(3, 6, 9, 6), (2, 6, 3, 130)])
def test_the_kernel_is_a_depthwise_convolution(shape, stripe):
  x, dy, kernel, bias = draw(shape, shape, (9, shape[-1]), (1, shape[-1]))

  def plain(x, kernel, bias):
    kernel = kernel.reshape(3, 3, 1, -1)
    parts = x if stripe is None else layers.partition_windows(x, stripe).reshape(-1, *stripe, shape[-1])
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
      parts, kernel, (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=shape[-1], precision="highest"
    )
    return bias[0] + (
      y
      if stripe is None
      else layers.merge_windows(y.reshape(len(x), -1, stripe[0] * stripe[1], shape[-1]), shape[1:3], stripe)
    )

  def fused(x, kernel, bias):
    tokens = x.reshape(len(x), -1, x.shape[-1])
    return fused_depthwise.depthwise_conv(tokens, kernel, bias, shape[1:3], stripe).reshape(shape)

  check_same(fused, plain, dy, x, kernel, bias)


@pytest.mark.parametrize(
  ("grid", "window", "shift", "dim", "heads", "biased"),
  [
    ((6, 9), (3, 3), (1, 2), 12, 3, True),
    ((6, 9), (3, 3), (0, 0), 160, 5, False),
    ((6, 9), (3, 3), (1, 2), 128, 4, True),
    ((16, 2), (8, 2), (4, 0), 12, 2, True),
    ((9, 4), (9, 1), (0, 0), 4, 1, False),  # stripes
    ((4, 9), (2, 9), (0, 0), 4, 1, False),
  ],
)
def test_the_kernel_finds_windows(grid, window, shift, dim, heads, biased):
  n, tokens = window[0] * window[1], grid[0] * grid[1]
  q, k, v, dy, bias = draw(*[(2, tokens, dim)] * 4, (heads, n, n))
  mask = swin.seam_mask(grid, window, shift) if any(shift) else None

  def plain(q, k, v, *bias):
    q, k, v = (
      layers.partition_windows(jnp.roll(x.reshape(2, *grid, dim), [-s for s in shift], (1, 2)), window)
      for x in (q, k, v)
    )
    maps = plain_maps(q, k, heads, 0.3, (bias[0] if biased else 0.0) + (0.0 if mask is None else mask[:, None]))
    return jnp.roll(layers.merge_windows(plain_weigh(maps, v), grid, window), shift, (1, 2)).reshape(dy.shape)

  windows = Windows(grid, window, shift)

  def fused(q, k, v, *bias):
    return attend_windows(q, k, v, *bias, *[None] * (1 - biased), mask, windows, dim // heads, 0.3)

  check_same(fused, plain, dy, q, k, v, *[bias][: int(biased)])
  if dim % 128 == 0:

    def packed(q, k, v, *bias):
      qkv = jnp.concatenate([q, k, v], axis=-1)
      return attend_packed_windows(qkv, *bias, *[None] * (1 - biased), mask, windows, heads, 0.3)

    check_same(packed, plain, dy, q, k, v, *[bias][: int(biased)])


@pytest.mark.parametrize("window", [(8, 2), (2, 6), (4, 3)])
@pytest.mark.parametrize("share", [0, 1])
def test_one_projection_of_a_share_gives_all_that_the_kernel_of_windows_reads(window, share):
  """Attention, values and the gradients of tokens, kernel and bias, of one of two sets of heads."""
  grid, dim, heads = (8, 6), 256, 2
  graphdef = nnx.graphdef(layers.PackedQKV(dim, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
  x, kernel, bias, dy, dv = draw((2, 48, dim), (dim, 3 * dim), (3 * dim,), *[(2, 48, dim // 2)] * 2)

  def plain(x, kernel, bias):
    qkv = (jnp.dot(x, kernel * dim**-0.5, precision="highest") + bias).reshape(2, 48, 3, 2, -1)[:, :, :, share]
    q, k, v = (layers.partition_windows(qkv[:, :, i].reshape(2, *grid, -1), window) for i in range(3))
    y = layers.merge_windows(plain_weigh(plain_maps(q, k, heads, 0.3), v), grid, window)
    return y.reshape(dy.shape), qkv[:, :, 2]

  def fused(x, kernel, bias):
    layer = nnx.merge(graphdef, dict(kernel=kernel * dim**-0.5, bias=bias))
    return attend_packed_stripes(layer.side_by_side(x, heads, share, 2), Windows(grid, window), heads, 0.3)

  check_same(fused, plain, (dy, dv), x, kernel, bias)


@pytest.mark.parametrize(
  ("kind", "tokens", "heads", "alone", "mixed"),
  [
    ("TPU v5", 577, 12, True, True), ("TPU v5", 655, 12, True, False), ("TPU v5", 1140, 6, False, False),
    ("TPU v5 lite", 655, 12, True, True), ("TPU v4", 197, 12, True, True), ("TPU v4", 577, 6, False, False),
    ("TPU v3", 197, 12, False, False),
  ],
)  # fmt: skip
def test_kernels_of_whole_images_keep_to_what_fits_on_a_chip(kind, tokens, heads, alone, mixed, on_a_kind):
  """577 tokens, 384 pixels, compile for v5p. Its compiler refused to mix 655, and 1140 alone: 72 of 64 MiB both."""
  q = jax.ShapeDtypeStruct((1, tokens, 35 * heads), jnp.bfloat16)
  with on_a_kind(kind):
    assert attention.is_fused(q, q, num_heads=heads) == alone
    assert attention.is_fused(q, q, num_heads=heads, held=attention.REATTENTION_MAPS * heads) == mixed


@pytest.mark.parametrize(
  ("kind", "side", "window", "dim", "width", "windows", "depthwise"),
  [
    ("TPU v4", 56, (7, 7), 96, 32, False, True),  # 21.7 of 16 MiB for the windows
    ("TPU v4", 28, (7, 7), 192, 32, True, True),
    ("TPU v4", 96, (96, 1), 48, 24, False, False),  # 24.0 of 16 MiB for the convolution of 96 channels
    ("TPU v5", 56, (56, 1), 32, 32, True, True),
    ("TPU v5", 96, (96, 1), 48, 24, False, True),  # CSWin-B at 384 pixels: 78.9 of 64 MiB
    ("TPU v5 lite", 96, (96, 1), 48, 24, True, True),
    ("TPU v3", 14, (7, 7), 384, 32, False, False),
  ],
)
def test_kernels_of_windows_keep_to_what_fits_on_a_chip(kind, side, window, dim, width, windows, depthwise, on_a_kind):
  """As compilers for these chips did or refused."""
  x = jax.ShapeDtypeStruct((2, side * side, dim), jnp.bfloat16)
  with on_a_kind(kind):
    assert Windows((side, side), window).fits(x, width) == windows
    assert fused_depthwise.fits(x, (side, side)) == depthwise


def test_a_kind_without_kernels_is_named(on_a_kind):
  q = jax.ShapeDtypeStruct((1, 20, 32), jnp.bfloat16)
  with on_a_kind("TPU v3"), pytest.raises(vx.UserError, match="it is for TPU v4 and newer; choose auto or reference"):
    attention.is_fused(q, q, num_heads=2, implementation="pallas")
