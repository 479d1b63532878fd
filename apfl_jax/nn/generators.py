"""The semantic generator: noise and what a class means, to images (method 2.6 [O], smooth as in method 8.4 [P]).

No batch statistics: a batch of a single class would normalise the class away (method 2.6 [P]).
"""

import functools

import jax.numpy as jnp
from flax import nnx

from apfl_jax.errors import InputError
from apfl_jax.nn.layers import Conv, functional, upsample
from apfl_jax.types import Array, Generator

_CODE = 64  # length of u
_linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.lecun_uniform())
_GROUPS = 8


def _encoder(embedding_size: int, rngs: nnx.Rngs) -> nnx.Linear:
  """W of u = tanh(W e)."""
  # Embeddings have norm 1 whatever D is, so weights of variance 1, not 1 / D, give codes of a useful size.
  return nnx.Linear(embedding_size, _CODE, use_bias=False, kernel_init=nnx.initializers.normal(1.0), rngs=rngs)


class Film(nnx.Module):
  """GroupNorm whose scale and shift are linear in the code (FiLM, Perez et al. 2018), then LeakyReLU(0.2)."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    """Args: channels, a multiple of 8; rngs."""
    self.norm = nnx.GroupNorm(channels, _GROUPS, use_scale=False, use_bias=False, rngs=rngs)
    self.modulation = _linear(_CODE, 2 * channels, rngs=rngs)

  def __call__(self, x: Array, code: Array) -> Array:
    """[B, H, W, channels], [B, 64] -> [B, H, W, channels]."""
    scale, shift = jnp.split(self.modulation(code)[:, None, None], 2, axis=-1)
    return nnx.leaky_relu(self.norm(x) * (1 + scale) + shift, 0.2)


class SmoothGenerator(nnx.Module):
  """A dense layer to a small grid, then 3 x 3 convolutions between one or two bilinear upsamplings."""

  def __init__(
    self,
    image_shape: tuple[int, int, int],
    embedding_size: int,
    noise_size: int,
    width: int,
    upsamplings: int,
    *,
    rngs: nnx.Rngs,
  ):
    """Args: image shape, D, length of the noise, channels of the first grid, upsamplings (1 or 2), rngs."""
    rows, columns, channels = image_shape
    self.grid = (rows >> upsamplings, columns >> upsamplings, width)
    self.upsamplings = upsamplings
    self.encode = _encoder(embedding_size, rngs)
    self.dense = _linear(noise_size + _CODE, self.grid[0] * self.grid[1] * width, rngs=rngs)
    self.film1 = Film(width, rngs=rngs)
    self.conv1 = Conv(width, width // 2, 3, rngs=rngs)
    self.film2 = Film(width // 2, rngs=rngs)
    self.conv2 = Conv(width // 2, width // 8, 3, rngs=rngs)
    self.conv3 = Conv(width // 8, channels, 3, rngs=rngs)

  def __call__(self, noise: Array, embedding: Array) -> Array:
    """Noise [B, noise_size], embedding [B, D] -> images [B, height, width, channels] in [0, 1]."""
    code = jnp.tanh(self.encode(embedding))
    x = self.dense(jnp.concatenate([noise, code], axis=-1)).reshape(-1, *self.grid)
    x = upsample(self.conv1(self.film1(x, code)))
    x = self.conv2(self.film2(x, code))
    if self.upsamplings == 2:
      x = upsample(x)
    return nnx.sigmoid(self.conv3(x))


def generator(
  image_shape: tuple[int, int, int], embedding_size: int, *, noise_size: int | None = None, width: int = 64
) -> Generator:
  """A generator as functions of its parameters. May be called inside a trace.

  u = tanh(W e) in R^64; dense([z, u]) to a grid of a quarter of the image's sides (half, under 16 pixels) with `width`
  channels; GroupNorm + FiLM(u), conv to width / 2, upsampling; GroupNorm + FiLM(u), conv to width / 8, upsampling (only
  from a quarter); conv to the image's channels, sigmoid.

  Parameters, h and w the sides of the grid, g the width, c the image's channels, n the noise:
  64 D + (n + 65) h w g + 195 g + (9 g + 1) g / 2 + (9 g / 2 + 1) g / 8 + (9 g / 8 + 1) c. With the defaults:
  8 x 8 x 1: 132,657 + 64 D; 28 x 28 x 1: 437,873 + 64 D; 32 x 32 x 3: 709,315 + 64 D.

  Args:
    image_shape: (height, width, channels); sides divisible by 4, or by 2 if one is under 16.
    embedding_size: D.
    noise_size: None takes 32 under 16 pixels, else 64 for one channel and 100 for more (method 2.6 [O]).
    width: channels of the first grid, a multiple of 16.

  Raises:
    InputError: sides or width that do not divide.
  """
  rows, columns, channels = image_shape
  small = min(rows, columns) < 16
  upsamplings = 1 if small else 2
  factor = 2**upsamplings
  if min(rows, columns) < factor or rows % factor or columns % factor:
    size = " x ".join(map(str, image_shape))
    raise InputError(f"generator: got images of {size}, needs height and width divisible by {factor}")
  if width < 16 or width % 16:
    raise InputError(f"generator: got width {width}, needs a multiple of 16")
  if noise_size is None:
    noise_size = 32 if small else 64 if channels == 1 else 100
  init, apply = functional(SmoothGenerator, image_shape, embedding_size, noise_size, width, upsamplings)
  return Generator(init=init, apply=apply, noise_size=noise_size)


class FeatureGenerator(nnx.Module):
  """One hidden layer, to what a classifier's head reads: a thousandth of an image generator's work."""

  def __init__(self, condition_size: int, noise_size: int, hidden: int, features: int, *, coded: bool, rngs: nnx.Rngs):
    """Args: length of the condition and of the noise, width of the hidden layer, F, whether u = tanh(W e), rngs."""
    self.encode = _encoder(condition_size, rngs) if coded else None
    self.dense = _linear(noise_size + (_CODE if coded else condition_size), hidden, rngs=rngs)
    self.norm = nnx.LayerNorm(hidden, rngs=rngs)
    self.out = _linear(hidden, features, rngs=rngs)

  def __call__(self, noise: Array, condition: Array) -> Array:
    """Noise [B, noise_size], condition [B, condition_size] -> features [B, F], not negative as after ReLU."""
    if self.encode is not None:
      condition = jnp.tanh(self.encode(condition))
    hidden = nnx.relu(self.norm(self.dense(jnp.concatenate([noise, condition], axis=-1))))
    return nnx.relu(self.out(hidden))


def feature_generator(
  condition_size: int, features: int, *, noise_size: int = 32, hidden: int = 256, coded: bool = False
) -> Generator:
  """A generator of features [B, F] in place of images, as FedGen's. May be called inside a trace.

  Args:
    condition_size: length of what a class is given as, C for one-hot labels.
    features: F.
    noise_size: length of the noise.
    hidden: width of the hidden layer.
    coded: whether the condition goes through u = tanh(W e) in R^64 first, as in `generator`; for embeddings.
  """
  init, apply = functional(FeatureGenerator, condition_size, noise_size, hidden, features, coded=coded)
  return Generator(init=init, apply=apply, noise_size=noise_size)
