"""Classifiers as a base, images to features, and a head, features to logits.

Sources: `cnn` is the MNIST network of FedAvg (McMahan et al. 2017, section 3); `cnn_small` is the network of the pilots
on Fashion-MNIST (method 8 [P]); the anchored head is method 2.4 [O]. No normalisation layers: a client's batch may hold
one class.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from apfl_jax.errors import InputError
from apfl_jax.nn.layers import Conv, functional, max_pool
from apfl_jax.types import Array, Key, Model, Params, PyTree

# Uniform, not truncated normal: of the same variance, and drawing it compiles several times faster.
_dense = functools.partial(nnx.Linear, kernel_init=nnx.initializers.he_uniform())  # ReLU follows
_readout = functools.partial(nnx.Linear, kernel_init=nnx.initializers.lecun_uniform())


class Mlp(nnx.Module):
  """One hidden layer."""

  def __init__(self, image_shape: tuple[int, int, int], features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    """Args: image shape, width of the hidden layer, dtype of the computation, rngs."""
    self.dense = _dense(math.prod(image_shape), features, dtype=dtype, rngs=rngs)

  def __call__(self, images: Array, by_image: bool) -> tuple[Array, tuple[Array, ...]]:
    """Images [B, height, width, channels] in [-1, 1] -> features [B, F] and the pre-activations."""
    hidden = self.dense(images.reshape(len(images), -1))
    return nnx.relu(hidden), (hidden,)


class Cnn(nnx.Module):
  """Two convolutions, each followed by a 2 x 2 maximum, and a dense layer."""

  def __init__(
    self,
    image_shape: tuple[int, int, int],
    features: int,
    *,
    size: int,
    channels: tuple[int, int],
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Args: image shape, width of the dense layer, kernel side, channels of the convolutions, dtype, rngs."""
    height, width, depth = image_shape
    self.conv1 = Conv(depth, channels[0], size, dtype=dtype, rngs=rngs)
    self.conv2 = Conv(channels[0], channels[1], size, dtype=dtype, rngs=rngs)
    self.dense = _dense((height // 4) * (width // 4) * channels[1], features, dtype=dtype, rngs=rngs)

  def __call__(self, images: Array, by_image: bool) -> tuple[Array, tuple[Array, ...]]:
    """Images [B, height, width, channels] in [-1, 1] -> features [B, F] and the pre-activations."""
    if by_image:
      first = self.conv1(images)
      second = self.conv2(nnx.relu(max_pool(first, 2)))
      hidden = self.dense(nnx.relu(max_pool(second, 2)).reshape(len(images), -1))
      return nnx.relu(hidden), (first, second, hidden)
    # ReLU and maximum commute: after the maximum, ReLU has a quarter of the work and no ties at zero arise.
    maxima, first = self.conv1.max_pooled(images.transpose(3, 1, 2, 0), 2)
    maxima, second = self.conv2.max_pooled(nnx.relu(maxima), 2)
    pooled = nnx.relu(maxima).transpose(1, 2, 0, 3)
    hidden = self.dense(pooled.reshape(-1, len(images)).T)
    return nnx.relu(hidden), (first.transpose(3, 1, 2, 0), second.transpose(3, 1, 2, 0), hidden)


class _Spec(NamedTuple):
  base: Callable[..., nnx.Module]
  features: int
  least: int  # the smallest image side


_SPECS = {
  "mlp": _Spec(Mlp, 200, 1),
  "cnn_small": _Spec(functools.partial(Cnn, size=3, channels=(16, 32)), 64, 4),
  "cnn": _Spec(functools.partial(Cnn, size=5, channels=(32, 64)), 512, 4),
}
MODELS = tuple(_SPECS)
HEADS = ("free", "anchored", "cosine")
_SHARPNESS = 10.0  # of the cosine head: its logits span 20


def classifier(
  name: str,
  image_shape: tuple[int, int, int],
  num_classes: int,
  *,
  head: str = "free",
  embeddings: Array | None = None,
  dtype: DTypeLike = jnp.float32,
) -> Model:
  """A classifier as functions of its parameters. May be called inside a trace.

  Images in [0, 1] are scaled to [-1, 1] by the base. Parameters, features, taps and logits are float32.

  Args:
    name: one of `MODELS`: `mlp`, one hidden layer of 200; `cnn_small`, 3 x 3 convolutions with 16 and 32 channels,
      dense 64; `cnn`, 5 x 5 convolutions with 32 and 64 channels, dense 512.
    image_shape: (height, width, channels).
    num_classes: C.
    head: 'free', W f + b; or 'anchored', logits_c = (V' f) . e_c with V [F, D] and no bias, so that a class without
      examples has logits too (method 2.4 [O]); or 'cosine', the same with cosines, logits_c = 10 cos(V' f, e_c).
    embeddings: [C, D], the rows e_c, of norm 1; may be traced. Only anchored heads read them.
    dtype: what layers compute in, float32 or bfloat16.

  Returns:
    Model; its taps are all pre-activations, first layer first.

  Raises:
    InputError: unknown name or head, images too small, or embeddings that do not fit.
  """
  if name not in _SPECS:
    raise InputError(f"model: got {name!r}, accepted are {', '.join(MODELS)}")
  if head not in HEADS:
    raise InputError(f"head: got {head!r}, accepted are {', '.join(HEADS)}")
  spec = _SPECS[name]
  if min(image_shape[:2]) < spec.least:
    size = " x ".join(map(str, image_shape))
    raise InputError(f"model {name}: got images of {size}, needs height and width of at least {spec.least}")
  init_base, apply_base = functional(spec.base, image_shape, spec.features, dtype=dtype)

  def base(params: PyTree, images: Array, by_image: bool = False) -> tuple[Array, tuple[Array, ...]]:
    return jax.tree.map(lambda x: x.astype(jnp.float32), apply_base(params, 2 * images - 1, by_image))

  init_head, apply_head, semantics = _head(head, spec.features, num_classes, embeddings, dtype)

  def init(key: Key) -> Params:
    base_key, head_key = jax.random.split(key)
    return Params(base=init_base(base_key), head=init_head(head_key))

  return Model(init, base, apply_head, semantics, by_image=functools.partial(base, by_image=True))


def _head(
  head: str, features: int, num_classes: int, embeddings: Array | None, dtype: DTypeLike
) -> tuple[Callable[[Key], PyTree], Callable[[PyTree, Array], Array], Callable[[PyTree, Array], Array] | None]:
  """The head's init and apply, and its map into the space of the embeddings if it has one."""
  if head == "free":
    init, apply = functional(_readout, features, num_classes, dtype=dtype)
    return init, lambda params, x: apply(params, x).astype(jnp.float32), None
  if embeddings is None or embeddings.ndim != 2 or len(embeddings) != num_classes:
    got = "none" if embeddings is None else f"shape {list(embeddings.shape)}"
    raise InputError(f"embeddings: got {got}, the {head} head needs [{num_classes}, D], a row for each class")
  size = embeddings.shape[1]
  init, apply = functional(_readout, features, size, use_bias=False, dtype=dtype)

  def semantics(params: PyTree, features: Array) -> Array:
    return apply(params, features).astype(jnp.float32)

  def anchored(params: PyTree, features: Array) -> Array:
    meant = semantics(params, features)
    if head == "cosine":
      # Safe also in the gradient, where all features are 0.
      meant = _SHARPNESS * meant * jax.lax.rsqrt(jnp.sum(meant**2, axis=-1, keepdims=True) + 1e-12)
    return meant @ embeddings.T

  return init, anchored, semantics
