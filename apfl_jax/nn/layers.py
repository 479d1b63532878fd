"""Layers that stay matrix products when every client has its own weights, and the one way out of Flax.

`vmap` over clients turns XLA's convolution into a grouped one, which its CPU backend computes slowly, also under
`lax.map`. So convolutions are matmuls here, and pooling and upsampling are reshapes and elementwise sums.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from apfl_jax.types import Array, Key, PyTree

Padding = Literal["SAME", "VALID"]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[[Key], PyTree], Callable[..., Any]]:
  """A module as two pure functions. `make` is traced abstractly once, so this is cheap, also inside a trace.

  Args:
    make: builds a module whose only state is `nnx.Param`s.

  Returns:
    init: (key) -> params, a nested dict of arrays.
    apply: (params, *inputs) -> what the module's `__call__` returns.
  """
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

  def init(key: Key) -> PyTree:
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

  def apply(params: PyTree, *inputs: Array) -> Any:
    return nnx.merge(graphdef, params)(*inputs)

  return init, apply


def conv2d(images: Array, kernel: Array, stride: int = 1, padding: Padding = "SAME") -> Array:
  """2-D cross-correlation: patches along the width only, then one matmul for each kernel row, summed.

  Patches along both axes would copy the images k * k times; these copy them k times.

  Args:
    images: [B, H, W, I].
    kernel: [k, k, I, O].
    stride: along both axes.
    padding: 'SAME' (H' = ceil(H / stride)) or 'VALID' (H' = floor((H - k) / stride) + 1), as in XLA.

  Returns:
    [B, H', W', O].
  """
  k, _, in_channels, out_channels = kernel.shape
  if padding == "SAME":
    missing = [max(k - stride if n % stride == 0 else k - n % stride, 0) for n in images.shape[1:3]]
    images = jnp.pad(images, ((0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)))
  height, width = (n - k + 1 for n in images.shape[1:3])  # stride 1; a slice with a step does the rest
  patches = jnp.concatenate([images[:, :, j : j + width : stride] for j in range(k)], axis=-1)
  rows = kernel.reshape(k, k * in_channels, out_channels)
  result = patches[:, :height:stride] @ rows[0]
  for i in range(1, k):
    result += patches[:, i : i + height : stride] @ rows[i]
  return result


def max_pool(x: Array, size: int) -> Array:
  """Maxima of non-overlapping windows, [B, H, W, C] -> [B, H // size, W // size, C]; what is left over is cut off."""
  batch, height, width, channels = x.shape
  height, width = height // size, width // size
  windows = x[:, : height * size, : width * size].reshape(batch, height, size, width, size, channels)
  return windows.max(axis=(2, 4))


def upsample(x: Array) -> Array:
  """Bilinear upsampling by two with half-pixel centres, [B, H, W, C] -> [B, 2 * H, 2 * W, C].

  A new pixel lies a quarter of a pixel from one old one, so the weights are always 3/4 and 1/4; edges repeat.
  """
  for axis in (1, 2):
    x = _double(x, axis)
  return x


def _double(x: Array, axis: int) -> Array:
  x = jnp.moveaxis(x, axis, 0)
  before = jnp.concatenate([x[:1], x[:-1]])
  after = jnp.concatenate([x[1:], x[-1:]])
  pairs = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=1)
  return jnp.moveaxis(pairs.reshape(2 * x.shape[0], *x.shape[1:]), 0, axis)


class Conv(nnx.Module):
  """`conv2d` with a bias; He initialisation (He et al. 2015), parameters always float32."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    size: int,
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Args: channels in and out, kernel side, stride and padding as `conv2d`, dtype of the computation, rngs."""
    self.kernel = nnx.Param(nnx.initializers.he_uniform()(rngs.params(), (size, size, in_channels, out_channels)))
    self.bias = nnx.Param(jnp.zeros((out_channels,)))
    self.stride = stride
    self.padding = padding
    self.dtype = dtype

  def __call__(self, images: Array) -> Array:
    """[B, H, W, in_channels] -> `dtype` [B, H', W', out_channels]."""
    images, kernel, bias = (x.astype(self.dtype) for x in (images, self.kernel[...], self.bias[...]))
    return conv2d(images, kernel, self.stride, self.padding) + bias.reshape(1, 1, 1, -1)
