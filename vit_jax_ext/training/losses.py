"""What training makes smaller, and the terms of it: pure JAX."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from vit_jax_ext.errors import UserError
from vit_jax_ext.models.functional import normalize, split_model
from vit_jax_ext.training.optimizer import classifier_mask

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (params, stats, batch, key) to the loss, and beside it new statistics and metrics.
Loss = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, tuple[Any, Metrics]]]
Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Returns the cross-entropy per example, (B,), at least float32.

  Args:
    logits: (B, classes).
    labels: class indices (B,), or probabilities (B, classes).
    smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016).
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def binary_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Returns the mean over the classes of the binary cross-entropy per example, (B,), at least float32.

  Args:
    logits: (B, classes).
    labels: which classes an image has, bool or shares (B, classes).
    smoothing: share of each target that becomes 1/2, as timm has it where images have several labels: the classes are
      independent, so there is nothing to spread over them.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  targets = labels.astype(logits.dtype) * (1 - smoothing) + smoothing / 2
  return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=-1)


def attention_cosine_loss(out: Mapping[str, jax.Array], blocks: Sequence[int]) -> jax.Array:
  """Returns the mean cosine similarity of neighbouring blocks' attention maps, a scalar, at least float32.

  DeepViT's regulariser, added with weight 0.1 to the cross-entropy of the 32-block recipe. As in the authors' code
  (zhoudaquan/dvit_repo, `SoftTargetCrossEntropyCosReg`): the cosine is taken **over the heads**, for each image, query
  and key, so what is penalised is that the heads share out a pair of tokens alike in both blocks; equation 2 of the
  paper, which `attention.similarity` computes, takes it over the queries. The code pairs the **first** blocks: its
  `cos_reg_component: 12` is `blocks=range(12)`, maps 0 with 1 to 11 with 12, although collapse is a matter of the last
  ones (`range(19, 31)` of 32).

  Args:
    out: a model's intermediates, with `blocks.{i}.attn` (B, heads, N, N) for block i.
    blocks: indices i; block i is compared with block i + 1.

  Raises:
    UserError: no block at all, or a block or its neighbour without an attention map of the same shape.
  """
  if not blocks:
    raise UserError("attention_cosine_loss has no blocks to compare; name at least one, or give the loss no weight")
  total = 0.0
  for i in blocks:
    p, q = (out.get(f"blocks.{j}.attn") for j in (i, i + 1))
    if p is None or q is None or p.shape != q.shape:
      raise UserError(
        f"attention_cosine_loss cannot compare blocks {i} and {i + 1}: the model has no attention maps of one size "
        "there; choose a ViT, DeiT or DeepViT and blocks below the last"
      )
    dtype = jnp.promote_types(p.dtype, jnp.float32)
    p, q = p.astype(dtype), q.astype(dtype)
    # torch's CosineSimilarity: no norm below 1e-8. The sqrt's gradient needs the floor inside it.
    norms = jnp.sqrt(jnp.maximum(jnp.sum(p * p, 1) * jnp.sum(q * q, 1), 1e-16))
    total += jnp.mean(jnp.sum(p * q, axis=1) / norms)
  return total / len(blocks)


def make_loss(
  graphdef: nnx.GraphDef,
  *,
  mean: Sequence[float],
  std: Sequence[float],
  multi_label: bool = False,
  label_smoothing: float = 0.0,
  cosine_weight: float = 0.0,
  cosine_blocks: Sequence[int] = (),
  linear_probe: bool = False,
  augment: Augment | None = None,
  gather: Callable[[Any], Any] = lambda params: params,
) -> Loss:
  """Returns `loss(params, stats, batch, key) -> (loss, (stats, metrics))` of a model in training.

  Args:
    graphdef: the model's structure.
    mean, std: normalisation of the images.
    multi_label: the loss is `binary_cross_entropy`, not `smoothed_cross_entropy`.
    label_smoothing: see there.
    cosine_weight: of `attention_cosine_loss` in the loss; 0 switches it off.
    cosine_blocks: its blocks.
    linear_probe: only the classifier has gradients; the rest of the model works as in evaluation.
    augment: called with (key, images, labels), returns images and labels; see `mixup.augment`. The images are
      normalised, the labels may become probabilities (B, classes). With accumulation it sees one part at a time.
    gather: brings the parameters from where they are kept to where they are used, see `partition.Layout`.

  The batch holds `image` uint8 (B, H, W, 3) and `label` int32 (B,), or bool (B, classes) with multi_label; from `key`
  come augmentation, dropout and stochastic depth. Metrics are scalars: loss, top1 (share; of mixed images those that
  are taken for the class of which they have the most; none with multi_label), and attention_cosine where it is part of
  the loss.
  """

  def loss_fn(params, stats, batch, key):
    if linear_probe:  # the compiler then drops the backward pass of what is frozen
      trained = classifier_mask(params)
      params = jax.tree.map(lambda train, param: param if train else jax.lax.stop_gradient(param), trained, params)
    images, labels = normalize(batch["image"], mean, std), batch["label"]
    if augment is not None:
      key, augment_key = jax.random.split(key)
      images, labels = augment(augment_key, images, labels)
    model = nnx.merge(graphdef, gather(params), stats)
    logits, out = model(images, train=not linear_probe, rngs=nnx.Rngs(key))
    loss = (binary_cross_entropy if multi_label else smoothed_cross_entropy)(logits, labels, label_smoothing).mean()
    metrics = {}
    if not multi_label:
      classes = labels if labels.ndim == 1 else jnp.argmax(labels, axis=-1)
      metrics["top1"] = jnp.mean(jnp.argmax(logits, axis=-1) == classes)
    if cosine_weight:
      metrics["attention_cosine"] = attention_cosine_loss(out, cosine_blocks)
      loss += cosine_weight * metrics["attention_cosine"]
    return loss, (split_model(model)[2], metrics | {"loss": loss})

  return loss_fn
