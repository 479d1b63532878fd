"""Layers against XLA's own convolution, pooling and resizing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from apfl_jax.nn import layers


def _normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def _xla_conv(images, kernel, stride, padding):
  return lax.conv_general_dilated(
    images, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
  )


def _xla_max_pool(x, size):
  return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, size, size, 1), "VALID")


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
  "shape, size, channels, stride",
  [((2, 8, 8, 1), 3, 4, 1), ((3, 7, 10, 3), 5, 2, 2), ((1, 5, 6, 2), 2, 3, 1), ((2, 9, 7, 2), 3, 2, 3)],
)
def test_conv_matches_xla_with_gradients(shape, size, channels, stride, padding):
  images, kernel = _normal(0, *shape), _normal(1, size, size, shape[-1], channels)
  expected, pull_expected = jax.vjp(jax.jit(lambda x, k: _xla_conv(x, k, stride, padding)), images, kernel)
  result, pull = jax.vjp(jax.jit(lambda x, k: layers.conv2d(x, k, stride, padding)), images, kernel)
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
  cotangent = _normal(2, *expected.shape)
  for got, want in zip(pull(cotangent), pull_expected(cotangent), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_conv_of_size_one_is_a_matmul():
  images, kernel = _normal(0, 2, 4, 5, 3), _normal(1, 1, 1, 3, 2)
  np.testing.assert_allclose(layers.conv2d(images, kernel), images @ kernel[0, 0], rtol=1e-5, atol=1e-6)


def test_conv_under_vmap_with_a_kernel_for_each_client():
  images, kernels = _normal(0, 3, 2, 6, 6, 2), _normal(1, 3, 3, 3, 2, 4)
  result = jax.jit(jax.vmap(layers.conv2d))(images, kernels)
  for i in range(3):
    np.testing.assert_allclose(result[i], _xla_conv(images[i], kernels[i], 1, "SAME"), rtol=1e-5, atol=1e-5)


def test_conv_module_adds_its_bias_and_keeps_float32_parameters():
  init, apply = layers.functional(layers.Conv, 2, 3, 3, padding="VALID", dtype=jnp.bfloat16)
  params = init(jax.random.key(0))
  assert {name: (x.shape, x.dtype) for name, x in params.items()} == {
    "kernel": ((3, 3, 2, 3), jnp.float32),
    "bias": ((3,), jnp.float32),
  }
  images = _normal(0, 2, 6, 6, 2)
  params["bias"] = jnp.array([1.0, -2.0, 3.0])
  result = apply(params, images)
  assert result.dtype == jnp.bfloat16
  expected = _xla_conv(images, params["kernel"], 1, "VALID") + params["bias"][None, None, None]
  np.testing.assert_allclose(result.astype(jnp.float32), expected, rtol=0.05, atol=0.1)


def test_a_module_is_made_once():
  ask = lambda padding: layers.functional(layers.Conv, 2, 3, 3, padding=padding)
  assert ask("VALID") is ask("VALID") is not ask("SAME")


def test_conv_module_keeps_the_variance_of_relu_networks():
  init, apply = layers.functional(layers.Conv, 32, 64, 3, padding="VALID")
  active = nnx.relu(_normal(0, 4, 16, 16, 32))  # mean square 1/2
  assert abs(float(apply(init(jax.random.key(1)), active).var()) - 1) < 0.15


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 7, 1), (1, 2, 2, 2)])
def test_max_pool_matches_xla_with_gradients(shape):
  x = _normal(0, *shape)
  expected, pull_expected = jax.vjp(lambda x: _xla_max_pool(x, 2), x)
  result, pull = jax.vjp(jax.jit(lambda x: layers.max_pool(x, 2)), x)
  np.testing.assert_array_equal(result, expected)
  cotangent = _normal(1, *expected.shape)
  np.testing.assert_allclose(pull(cotangent)[0], pull_expected(cotangent)[0], rtol=1e-6)


@pytest.mark.parametrize(
  "shape, k, channels, size",
  [((2, 8, 8, 1), 3, 4, 2), ((3, 7, 10, 3), 5, 2, 2), ((1, 5, 6, 2), 2, 3, 3), ((2, 4, 5, 2), 3, 3, 1)],
)
def test_conv_max_pool_matches_xla_with_gradients(shape, k, channels, size):
  def xla(x, kernel, bias):
    pixels = _xla_conv(x, kernel, 1, "SAME") + bias
    return _xla_max_pool(pixels, size), pixels

  def batch_last(x, kernel, bias):
    maxima, pixels = layers.conv2d_max_pool(x.transpose(3, 1, 2, 0), kernel, bias, size)
    return maxima.transpose(3, 1, 2, 0), pixels.transpose(3, 1, 2, 0)

  inputs = _normal(0, *shape), _normal(1, k, k, shape[-1], channels), _normal(2, channels)
  expected, pull_expected = jax.vjp(jax.jit(xla), *inputs)
  result, pull = jax.vjp(jax.jit(batch_last), *inputs)
  cotangent = tuple(_normal(3, *x.shape) for x in expected)
  got = (result, pull(cotangent), pull((cotangent[0], jnp.zeros_like(cotangent[1]))))
  want = (expected, pull_expected(cotangent), pull_expected((cotangent[0], jnp.zeros_like(cotangent[1]))))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, want)


def test_conv_max_pool_under_vmap_with_a_kernel_for_each_client():
  images, kernels, biases = _normal(0, 3, 2, 6, 6, 2), _normal(1, 3, 3, 3, 2, 4), _normal(2, 3, 4)
  results = jax.jit(jax.vmap(lambda *inputs: layers.conv2d_max_pool(*inputs, 2)))(images, kernels, biases)
  for i in range(3):
    expected = layers.conv2d_max_pool(images[i], kernels[i], biases[i], 2)
    for got, want in zip(results, expected, strict=True):
      np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-5)


def test_conv_max_pool_has_the_second_derivatives_of_xla():
  def xla(params):
    pixels = _xla_conv(images, params["kernel"], 1, "SAME") + params["bias"]
    return jnp.sum(jnp.tanh(_xla_max_pool(pixels, 2)))

  def ours(params):
    maxima, _ = layers.conv2d_max_pool(images.transpose(3, 1, 2, 0), params["kernel"], params["bias"], 2)
    return jnp.sum(jnp.tanh(maxima))

  images = _normal(0, 2, 6, 6, 2)
  params = {"kernel": 0.3 * _normal(1, 3, 3, 2, 3), "bias": _normal(2, 3)}
  direction = {"kernel": _normal(3, 3, 3, 2, 3), "bias": _normal(4, 3)}
  got = jax.jvp(jax.grad(ours), (params,), (direction,))[1]
  # XLA's max pooling has no second derivative in JAX; the difference of its first ones is close.
  step = 1e-3
  ahead, behind = (jax.tree.map(lambda p, d, s=s: p + s * d, params, direction) for s in (step, -step))
  want = jax.tree.map(lambda a, b: (a - b) / (2 * step), jax.grad(xla)(ahead), jax.grad(xla)(behind))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02), got, want)


def test_of_equal_maxima_the_first_has_the_gradient_and_a_nan_stays():
  windows = jnp.array([[1.0, 3.0, 2.0, 2.0], [3.0, 0.0, 2.0, 2.0], [jnp.nan, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, jnp.nan]])
  x = windows.reshape(1, 4, 4, 1)
  result, pull = jax.vjp(lambda x: layers.max_pool(x, 2), x)
  np.testing.assert_array_equal(result[0, :, :, 0], [[3.0, 2.0], [np.nan, np.nan]])
  expected = np.zeros((4, 4))
  expected[[0, 0, 2, 3], [1, 2, 0, 3]] = 1.0
  np.testing.assert_array_equal(pull(jnp.ones((1, 2, 2, 1)))[0][0, :, :, 0], expected)


@pytest.mark.parametrize("shape", [(2, 7, 7, 3), (1, 4, 6, 1), (2, 1, 3, 2)])
def test_upsample_matches_resize_with_gradients(shape):
  def resize(x):
    return jax.image.resize(x, (shape[0], 2 * shape[1], 2 * shape[2], shape[3]), "bilinear")

  x = _normal(0, *shape)
  expected, pull_expected = jax.vjp(resize, x)
  result, pull = jax.vjp(jax.jit(layers.upsample), x)
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
  cotangent = _normal(1, *expected.shape)
  np.testing.assert_allclose(pull(cotangent)[0], pull_expected(cotangent)[0], rtol=1e-5, atol=1e-5)
