"""Layers that stay matrix products when every client has its own weights, and the one way out of Flax.

`vmap` over clients turns XLA's convolution into a grouped one, which its CPU backend computes slowly, also under
`lax.map`. So convolutions are matmuls here, and pooling and upsampling are slices and elementwise operations.

Classifiers train through `conv2d_max_pool`, whose arrays hold the batch last, [C, H, W, B]. Every copy then moves runs
of pixels, every matmul is as wide as the pixels of the batch however few the channels, and no layout changes between
them; on a CPU that is about twice as fast as `conv2d` and `max_pool`. The gradient by the images is where these are the
faster ones: a generator's teacher, which is not trained itself, goes through them.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from apfl_jax.types import Array, Key, PyTree

Padding = Literal["SAME", "VALID"]


def functional(
  module: Callable[..., nnx.Module], *args: Any, **settings: Any
) -> tuple[Callable[[Key], PyTree], Callable[..., Any]]:
  """A module as two pure functions, the same ones when asked again: a trace builds its method many times.

  Args:
    module: (*args, rngs=nnx.Rngs, **settings) -> a module whose only state is `nnx.Param`s. It is kept with its
      arguments, so let it be known by a name at the top level of a file.
    *args: hashable.
    **settings: hashable.

  Returns:
    init: (key) -> params, a nested dict of arrays.
    apply: (params, *inputs) -> what the module's `__call__` returns.
  """
  return _functional(module, *args, **settings)


@functools.lru_cache(maxsize=256)
def _functional(  # apart, since type checkers have a cached function take what is declared Hashable alone
  module: Callable[..., nnx.Module], *args: Any, **settings: Any
) -> tuple[Callable[[Key], PyTree], Callable[..., Any]]:
  make = functools.partial(module, *args, **settings)
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

  def init(key: Key) -> PyTree:
    return nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(key)), nnx.Param))

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
  """Maxima of non-overlapping windows, [B, H, W, C] -> [B, H // size, W // size, C]; what is left over is cut off.

  Of equal maxima the first, row by row, takes the gradient, as in XLA and PyTorch.
  """
  height, width = (n // size * size for n in x.shape[1:3])
  return functools.reduce(_larger, [x[:, i:height:size, j:width:size] for i in range(size) for j in range(size)])


def conv2d_max_pool(images: Array, kernel: Array, bias: Array, size: int) -> tuple[Array, Array]:
  """`conv2d` (stride 1, 'SAME') plus a bias, then `max_pool`; batch last.

  The output pixels of each place in a window are one matmul over k * k patches, so the maximum is elementwise over
  size * size matrices, and neither it nor its gradient moves anything. A single matmul, split into windows afterwards,
  spends more time on the split than it gains.

  Args:
    images: [I, H, W, B].
    kernel: [k, k, I, O].
    bias: [O].
    size: of the windows.

  Returns:
    maxima: [O, H // size, W // size, B].
    pixels: [O, H, W, B], what the maxima are of; costs nothing under `jit` where it is not used.
  """
  k, _, in_channels, out_channels = kernel.shape
  height, width, batch = images.shape[1:]
  rows, columns = -(-height // size), -(-width // size)  # windows, begun ones too: `pixels` needs them
  before = (k - 1) // 2
  after = [n * size - m + k - 1 - before for n, m in ((rows, height), (columns, width))]
  images = jnp.pad(images, ((0, 0), (before, after[0]), (before, after[1]), (0, 0)))
  weights = kernel.reshape(-1, out_channels)  # not transposed: XLA's CPU backend finds better matmuls this way

  def matrix(row: int, column: int) -> Array:
    """[O, rows * columns * B], the pixels at one place in their windows."""
    patches = [
      images[:, i : i + rows * size : size, j : j + columns * size : size]
      for i in range(row, row + k)
      for j in range(column, column + k)
    ]
    return jnp.tensordot(weights, jnp.concatenate(patches).reshape(len(weights), -1), (0, 0))

  places = [matrix(row, column) for row in range(size) for column in range(size)]
  maxima = functools.reduce(_larger, places).reshape(out_channels, rows, columns, batch) + bias.reshape(-1, 1, 1, 1)
  pixels = jnp.stack(places).reshape(size, size, out_channels, rows, columns, batch).transpose(2, 3, 0, 4, 1, 5)
  pixels = pixels.reshape(out_channels, rows * size, columns * size, batch)[:, :height, :width]
  return maxima[:, : height // size, : width // size], pixels + bias.reshape(-1, 1, 1, 1)


def _larger(first: Array, second: Array) -> Array:
  """The maximum, NaN if there is one; the gradient goes to the first of two equals, not to both."""
  return jnp.where((second > first) | (second != second), second, first)


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

  def max_pooled(self, images: Array, size: int) -> tuple[Array, Array]:
    """[in_channels, H, W, B] -> what `conv2d_max_pool` returns, in `dtype`; for stride 1 and 'SAME'."""
    images, kernel, bias = (x.astype(self.dtype) for x in (images, self.kernel[...], self.bias[...]))
    return conv2d_max_pool(images, kernel, bias, size)
