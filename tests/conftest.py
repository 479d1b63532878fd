"""What every test shares. JAX reads its settings from the environment, which programs under test inherit."""

import os
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
  """Runs before any test module imports JAX."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  if config.option.markexpr == "not slow":
    # Compiling is most of the time that the tests take; what takes minutes is better off with fast programs.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if metadata.version("jaxlib").startswith("0.10."):  # XLA ends a program that asks for what it does not know
      os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
  if config.pluginmanager.has_plugin("cacheprovider"):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(scope="session")
def tfds_dir() -> Path:
  """The folder of prepared data sets, `data_dir` of tensorflow-datasets."""
  folder = Path(os.environ.get("APFL_JAX_TFDS", ROOT.parent / "shared" / "tfds"))
  if not folder.is_dir():
    pytest.skip(f"needs prepared data sets: no folder {folder}; name another with APFL_JAX_TFDS")
  return folder
