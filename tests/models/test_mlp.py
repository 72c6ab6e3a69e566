"""GELU, and the kernels of MLP and projections of a block, interpreted, against SciPy and plain jnp."""

import functools

from flax import nnx
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np
import pytest
import scipy.special

import vit_jax_ext as vx
from vit_jax_ext.models import (
  attention,
  cswin,
  deepvit,
  dropout,
  fused_mlp,
  fused_projections,
  gelu,
  kernels,
  layers,
  pyramid,
  swin,
  token_kernels,
)
from vit_jax_ext.models.fused_windows import Windows, attend_windows


def draw(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("largest", [0.01, 1, 12, 1e4, 3e38])
def test_tanh_gives_the_normal_distribution(largest):
  x = np.linspace(-largest, largest, 100_001).astype(np.float32)
  exact = scipy.special.ndtr(x.astype(np.float64))
  cdf = np.asarray(gelu.normal_cdf(jnp.asarray(x)), np.float64)
  assert np.abs(x * (cdf - exact)).max() < 4e-6
  density = np.exp(-0.5 * np.square(x.astype(np.float64))) / np.sqrt(2 * np.pi)
  slope = np.asarray(gelu.gelu_derivative(jnp.asarray(x), jnp.asarray(cdf, jnp.float32)))
  np.testing.assert_allclose(slope, exact + x * density, atol=2e-5)


def test_gelu_of_all_bfloat16_numbers_on_tpus(monkeypatch):
  """At most the next number to the right one, and that seldom, where it is 0.002 or more."""
  numbers = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
  numbers = numbers[np.isfinite(numbers.astype(np.float32)) & (np.abs(numbers.astype(np.float32)) < 1e30)]
  exact = numbers.astype(np.float64) * scipy.special.ndtr(numbers.astype(np.float64))
  monkeypatch.setattr(gelu, "platform", lambda: "tpu")
  ours, back = jax.vjp(gelu.gelu, jnp.asarray(numbers))
  assert ours.dtype == jnp.bfloat16
  assert "tanh" in str(jax.make_jaxpr(gelu.gelu)(numbers)) and "erf" not in str(jax.make_jaxpr(gelu.gelu)(numbers))
  away = np.abs(np.asarray(ours).view(np.int16).astype(int) - exact.astype(ml_dtypes.bfloat16).view(np.int16))
  large = np.abs(exact) >= 0.002
  assert away[large].max() == 1 and (away[large] == 1).mean() < 1e-3
  np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8, atol=4e-6)
  density = np.exp(-0.5 * np.square(numbers.astype(np.float64))) / np.sqrt(2 * np.pi)
  slope = scipy.special.ndtr(numbers.astype(np.float64)) + numbers.astype(np.float64) * density
  (ours,) = back(jnp.ones_like(numbers))
  np.testing.assert_allclose(np.asarray(ours, np.float64), slope, rtol=2**-8, atol=2e-5)


def parameters(dim, hidden):
  scale, *others = draw((dim,), (dim,), (dim, hidden), (hidden,), (hidden, dim), (dim,), seed=1)
  scale, bias, w1, b1, w2, b2 = 1 + 0.1 * scale, *(0.2 * x for x in others)
  return (scale, bias), (w1, b1), (w2, b2)


def plain_norm(x, scale, bias):
  return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def plain(x, keep, norm, fc1, fc2):
  hidden = jnp.dot(plain_norm(x, *norm), fc1[0], precision="highest") + fc1[1]
  hidden = hidden * (1 + jax.lax.erf(hidden / 2**0.5)) / 2
  return x + keep * (jnp.dot(hidden, fc2[0], precision="highest") + fc2[1])


def gradients(function, x, keep, dy, *others):
  y, back = jax.vjp(lambda x, *others: function(x, keep, *others), x, *others)
  return y, back(dy)


def fused(dtype):
  return lambda x, keep, *others: fused_mlp.add_mlp(x, keep, *others, 1e-5, dtype)


def fused_branch(x, keep, norm, qkv, proj):
  """In two shares, each with two terms: q * k, and values that are used twice."""
  parts = (0, 2, 4, 4, 1, 3, 5, 5)
  x, each = fused_projections.project_normed(x, norm, qkv, parts, 1e-5, jnp.float32)
  ys = [[q * k, v + again] for q, k, v, again in (each[:4], each[4:])]
  return fused_projections.add_projected(x, ys, keep, proj)


@pytest.fixture(params=["lanes", "rows"])
def layout(request, monkeypatch):
  """Tokens along the lanes, or row by row, whatever their width."""
  monkeypatch.setattr(token_kernels, "NARROW", 192 if request.param == "lanes" else 0)
  return request.param


@pytest.mark.parametrize(
  ("tokens", "dim", "held"), [(300, 24, 128 * 96), (300, 24, 2**18), (256, 16, 1), (49, 40, 2**18), (128, 8, 2**18)]
)
def test_the_kernels_are_the_mlp_half_of_a_block(tokens, dim, held, layout, monkeypatch):
  """Values and all gradients: tokens in several steps, with and without a rest, or in one; one image is dropped."""
  monkeypatch.setattr(token_kernels, "HELD", (held, held))
  x, dy = draw(*[(3, tokens, dim)] * 2)
  keep = jnp.asarray([0.0, 1.25, 1.0]).reshape(3, 1, 1)
  with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("highest"):
    ours = jax.jit(functools.partial(gradients, fused(jnp.float32)))(x, keep, dy, *parameters(dim, 4 * dim))
  theirs = jax.jit(functools.partial(gradients, plain))(x, keep, dy, *parameters(dim, 4 * dim))
  for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    assert a.shape == b.shape and a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
  np.testing.assert_array_equal(ours[0][0], x[0])


@pytest.mark.parametrize(
  ("tokens", "dim", "held"), [(300, 24, 128 * 72), (300, 24, 2**18), (49, 40, 1), (128, 8, 2**18)]
)
def test_the_kernels_are_what_is_before_attention_and_after_it(tokens, dim, held, layout, monkeypatch):
  """Values and all gradients."""
  monkeypatch.setattr(token_kernels, "HELD", (held, held))
  x, dy = draw(*[(3, tokens, dim)] * 2)
  keep = jnp.asarray([0.0, 1.25, 1.0]).reshape(3, 1, 1)
  norm, _, proj = parameters(dim, dim)
  qkv = tuple(0.2 * x for x in draw((dim, 3 * dim), (3 * dim,), seed=2))

  def plain_branch(x, keep, norm, qkv, proj):
    q, k, v = jnp.split(jnp.dot(plain_norm(x, *norm), qkv[0], precision="highest") + qkv[1], 3, axis=-1)
    return x + keep * (jnp.dot(q * k + 2 * v, proj[0], precision="highest") + proj[1])

  with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("highest"):
    ours = jax.jit(functools.partial(gradients, fused_branch))(x, keep, dy, norm, qkv, proj)
  theirs = jax.jit(functools.partial(gradients, plain_branch))(x, keep, dy, norm, qkv, proj)
  for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    assert a.shape == b.shape and a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("what", ["mlp", "branch"])
def test_devices_sum_up_the_gradients_of_their_images(what):
  """Four devices with an image each, and three images that do not divide, which all devices get."""
  function = fused(jnp.float32) if what == "mlp" else fused_branch
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2, 1), ("data", "fsdp0", "model"))
  for images in (4, 3):
    x, dy = draw(*[(images, 20, 16)] * 2)
    norm, fc1, fc2 = parameters(16, 48)
    arguments = (x, jnp.ones((images, 1, 1)), dy, norm, fc1, fc2 if what == "mlp" else (fc2[0][:16, :16], fc2[1][:16]))
    with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("highest"):
      alone = jax.jit(functools.partial(gradients, function))(*arguments)
      by_image = NamedSharding(mesh, P(("data", "fsdp0")) if images == 4 else P())
      placed = [*(jax.device_put(x, by_image) for x in arguments[:3]), *arguments[3:]]
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        split = jax.jit(functools.partial(gradients, function))(*placed)
    for a, b in zip(*map(jax.tree.leaves, (split, alone)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("what", ["mlp", "branch", "windows"])
def test_cores_sum_up_the_gradients_of_their_images(what, monkeypatch):
  """Two cores share four images; of three each would have one and a half, so one core has them all."""

  def windows(x, keep, norm, qkv, proj):
    q, k, v = jnp.split(x @ qkv[0] + qkv[1], 3, axis=-1)
    bias = jnp.outer(norm[0], norm[1])[:8, :8].reshape(2, 4, 8)[:, :, :4]
    return attend_windows(q, k, v, bias, None, Windows((4, 4), (2, 2)), 8, 0.3) @ proj[0] + keep * proj[1]

  function = {"mlp": fused(jnp.float32), "branch": fused_branch, "windows": windows}[what]
  norm, fc1, fc2 = parameters(16, 48)
  for images in (4, 3):
    x, dy = draw(*[(images, 16, 16)] * 2)
    last = fc2 if what == "mlp" else (fc2[0][:16, :16], fc2[1])
    arguments, found = (x, jnp.ones((images, 1, 1)), dy, norm, fc1, last), []
    for cores in (1, 2):
      monkeypatch.setattr(kernels, "num_cores", lambda cores=cores: cores)
      jax.clear_caches()
      with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("highest"):
        run = functools.partial(gradients, function)
        grids = {(1, images, 1)} if cores == 1 or images == 3 else {(2, 2, 1)}
        assert set(grids_of(jax.make_jaxpr(run)(*arguments).jaxpr)) == grids
        found.append(jax.jit(run)(*arguments))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))
  jax.clear_caches()


def grids_of(jaxpr):
  """Yields the grids of all kernels in a program."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      yield eqn.params["grid_mapping"].grid
    else:
      for inner in jax.core.jaxprs_in_params(eqn.params):
        yield from grids_of(inner)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_a_block_is_the_same_with_the_kernels(param_dtype, monkeypatch):
  """Also which images it drops; the kernels round less, so this is bfloat16's precision."""

  class Block(pyramid.PyramidBlock):
    def attend(self, x, rngs):
      return x, {}

  kw = dict(dtype=jnp.bfloat16, param_dtype=param_dtype, rngs=nnx.Rngs(0))
  graphdef, params, rest = nnx.split(Block(16, 4.0, 0.0, 0.5, **kw), nnx.Param, ...)
  x, dy = draw(*[(8, 40, 16)] * 2)

  def run(params, x):
    def values(params, x):
      return nnx.merge(graphdef, params, rest)(x, nnx.Rngs(1))[0]

    y, back = jax.vjp(values, params, x)
    return y, back(dy)

  theirs = run(params, x)
  for module in (layers, gelu):
    monkeypatch.setattr(module, "platform", lambda: "tpu")
  with pltpu.force_tpu_interpret_mode():
    assert "pallas_call" in str(jax.make_jaxpr(run)(params, x))
    ours = run(params, x)
  dropped = np.asarray((theirs[0] == x).all((1, 2)))
  assert 0 < dropped.sum() < 8
  np.testing.assert_array_equal((ours[0] == x).all((1, 2)), dropped)
  for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    assert a.dtype == b.dtype
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)


def test_what_the_kernels_do_not_take_is_left_to_xla(monkeypatch):
  monkeypatch.setattr(layers, "platform", lambda: "tpu")
  kw = dict(dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

  def is_fused(mlp, dim=16, tokens=196, dtype=jnp.float32, train=False):
    norm = layers.LayerNorm(dim, **kw)

    def run(x):
      return mlp.add_to(x, norm, dropout.DropPath(0.0), nnx.Rngs(0) if train else None)

    return "pallas_call" in str(jax.make_jaxpr(run)(jax.ShapeDtypeStruct((2, tokens, dim), dtype)))

  mlp = layers.Mlp(16, 64, 0.1, **kw)
  assert is_fused(mlp) and not is_fused(mlp, train=True)
  assert is_fused(layers.Mlp(16, 64, **kw), train=True)
  assert not is_fused(layers.Mlp(16, 64, **kw | dict(dtype=jnp.float32)))
  assert not is_fused(mlp, dtype=jnp.bfloat16)
  assert is_fused(layers.Mlp(256, 1024, **kw), dim=256)
  assert not is_fused(layers.Mlp(256, 1024, **kw), dim=256, tokens=49)
  mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
  with jax.sharding.use_abstract_mesh(mesh):
    assert not is_fused(mlp)
  mlp.implementation = "reference"
  assert not is_fused(mlp)


DRAWN = (0.0, 0.0, 0.5)  # rates of dropout and of stochastic depth
RE_ATTENTION = functools.partial(deepvit.ReAttention, norm="batch", reatten_scale=None)


@pytest.mark.parametrize(
  ("make", "dim", "number"),
  [
    (lambda **kw: swin.SwinBlock(128, 4, (4, 4), (2, 2), (1, 1), 2.0, *DRAWN, **kw), 128, 8),
    (lambda **kw: cswin.CSWinBlock(256, 4, (4, 4), [(4, 2), (2, 4)], 1.0, *DRAWN, **kw), 256, 14),
    (lambda **kw: layers.Block(128, 2, 2.0, *DRAWN, **kw), 128, 8),
    (lambda **kw: layers.Block(24, 3, 2.0, *DRAWN, adjustment=0.5, attention=RE_ATTENTION, **kw), 24, 10),
  ],
  ids=["swin", "cswin", "vit", "deepvit"],
)
def test_wide_blocks_are_the_same_with_the_kernels(make, dim, number, monkeypatch):
  """Values, maps and gradients in training, in float32, which the kernels do for this test alone."""
  monkeypatch.setattr(token_kernels, "DTYPE", jnp.float32)
  monkeypatch.setattr(token_kernels, "NARROW", 0)
  monkeypatch.setattr(token_kernels, "FEWEST", 0)
  block = make(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  options = {} if isinstance(block, pyramid.PyramidBlock) else {"train": True}
  graphdef, params, rest = nnx.split(block, nnx.Param, ...)
  params = jax.tree.map(lambda x: x + 0.1 * draw(x.shape, seed=x.size)[0], params)
  x, dy = draw(*[(4, 16, dim)] * 2)

  def run(params, x):
    def values(params, x):
      block = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, rest))
      return block(x, nnx.Rngs(1), **options)

    (y, maps), back = jax.vjp(values, params, x)
    return y, maps, back((dy, jax.tree.map(jnp.zeros_like, maps)))

  found = []
  for platform in ("cpu", "tpu"):
    for module in (attention, layers, gelu):
      monkeypatch.setattr(module, "platform", lambda platform=platform: platform)
    with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("highest"):
      assert str(jax.make_jaxpr(functools.partial(run))(params, x)).count("pallas_call[") == (
        number if platform == "tpu" else 0
      )
      found.append(jax.jit(functools.partial(run))(params, x))  # traced anew
  for a, b in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()) + 1e-6)


@pytest.mark.parametrize(
  ("name", "number", "overrides"),
  [
    (
      "boat_swin_tiny",  # three blocks' MLPs, two projections of the two with several windows, and of one with clusters
      6 + 8 + 4,
      dict(depths=(2, 1), num_heads=(2, 3), window_size=4, embed_dim=12, patch_size=2, cluster_size=4, overlap=2),
    ),
    (
      "boat_cswin_tiny",
      4 + 8 + 4,  # and of the stripes of one block
      dict(depth=(1, 1), num_heads=(2, 4), split_size=(1, 4), embed_dim=12, cluster_size=4),
    ),
  ],
)
def test_a_model_is_the_same_with_the_kernels(name, number, overrides, monkeypatch):
  """Logits, clusters and gradients in training, in float32, which the kernels do for this test alone."""
  images, found, used, call = draw((2, 16, 16, 3))[0], {}, [], token_kernels.call
  monkeypatch.setattr(token_kernels, "call", lambda kernel, *others: used.append(kernel) or call(kernel, *others))
  monkeypatch.setattr(token_kernels, "DTYPE", jnp.float32)
  model = vx.create_model(name, rngs=nnx.Rngs(0), num_classes=5, image_size=16, drop_path_rate=0.3, **overrides)
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def step(params):
    def loss(params):
      logits, out = nnx.merge(graphdef, params, rest)(images, train=True, rngs=nnx.Rngs(1))
      return jnp.square(logits).sum(), (logits, {key: value for key, value in out.items() if "clusters" in key})

    return jax.grad(loss, has_aux=True)(params)

  for platform in ("cpu", "tpu"):
    for module in (attention, layers, gelu):
      monkeypatch.setattr(module, "platform", lambda platform=platform: platform)
    with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("highest"):
      found[platform] = jax.tree.leaves(jax.jit(functools.partial(step))(params))  # traced anew
    assert len(used) == (0 if platform == "cpu" else number)
  for a, b in zip(*found.values(), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)


@pytest.mark.parametrize(
  ("name", "overrides"),
  [
    ("deit_tiny_patch16_224", dict(patch_size=4, embed_dim=12, num_heads=2, depth=1)),
    ("boat_swin_tiny", dict(depths=(2, 1), num_heads=(2, 3), window_size=4, embed_dim=12, patch_size=2)),
    ("boat_cswin_tiny", dict(depth=(1, 1), num_heads=(2, 4), split_size=(1, 4), embed_dim=12)),
  ],
)
def test_reference_is_without_kernels(name, overrides, monkeypatch):
  for module in (attention, layers, gelu):
    monkeypatch.setattr(module, "platform", lambda: "tpu")
  for implementation in ("auto", "reference"):
    model = vx.create_model(
      name, rngs=nnx.Rngs(0), image_size=16, dtype="bfloat16", attention=implementation, **overrides
    )
    program = str(jax.make_jaxpr(lambda x, model=model: model(x)[0])(jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)))
    assert ("pallas_call" in program) == (implementation == "auto")


@pytest.mark.parametrize(
  ("kind", "tokens", "dim", "shares", "mlp", "projections"),
  [
    ("TPU v4", 784, 192, 1, True, True),
    ("TPU v4", 3136, 64, 2, True, False),  # 19.7 of 16 MiB
    ("TPU v4", 9216, 128, 1, False, False),  # 19.8 of 16 MiB for the MLP
    ("TPU v5", 9216, 128, 1, True, True),
    ("TPU v5 lite", 9216, 96, 2, True, True),
    ("TPU v5 lite", 196, 256, 1, True, True),
    ("TPU v5 lite", 49, 768, 1, False, False),  # so few that products would wait for weights
    ("TPU v4", 197, 384, 1, False, True),  # 18.2 of 16 MiB for the MLP
    ("TPU v4", 197, 768, 1, False, False),  # 24.1 of 16 MiB for the projections
    ("TPU v5", 197, 768, 1, True, True),
    ("TPU v5", 577, 768, 1, False, True),  # 65.1 of 63.9 MiB for the MLP
    ("TPU v5", 785, 384, 1, True, True),
    ("TPU v6 lite", 577, 768, 1, True, True),
    ("TPU v3", 784, 96, 1, False, False),
  ],
)
def test_the_kernels_keep_to_what_fits_on_a_chip(kind, tokens, dim, shares, mlp, projections):
  """As compilers for these chips did or refused; values are used twice."""
  x = jax.ShapeDtypeStruct((8, tokens, dim), jnp.float32)
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
  auto = (jax.sharding.AxisType.Auto,)
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), auto, abstract_device=device)):
    assert fused_mlp.fits(x, jnp.bfloat16, 4 * dim) == mlp
    assert fused_projections.fits(x, jnp.bfloat16, 4 * shares, shares) == projections
