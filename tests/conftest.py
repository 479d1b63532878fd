"""What every test shares. JAX reads its settings from the environment, which programs under test inherit."""

import gc
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
  """Runs before any test module imports JAX; a method given by `-p` has."""

  def choose(name: str, value: bool | float | str) -> None:
    if name.upper() not in os.environ:
      os.environ[name.upper()] = str(value)
      if "jax" in sys.modules:
        sys.modules["jax"].config.update(name, value)

  # Tracing makes objects by the million, few of which are garbage: at Python's own thresholds looking for it costs a
  # seventh of the time.
  gc.set_threshold(100_000, 50, 10)
  choose("jax_platforms", "cpu")
  if config.option.markexpr == "not slow":
    # Compiling is most of the time that the tests take; what takes minutes is better off with fast programs.
    choose("jax_disable_most_optimizations", True)
    if metadata.version("jaxlib").startswith("0.10."):  # XLA ends a program that asks for what it does not know
      os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
  if config.pluginmanager.has_plugin("cacheprovider"):
    choose("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    choose("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def tfds_dir() -> Path:
  """The folder of prepared data sets, `data_dir` of tensorflow-datasets."""
  folder = Path(os.environ.get("APFL_JAX_TFDS", ROOT.parent / "shared" / "tfds"))
  if not folder.is_dir():
    pytest.skip(f"needs prepared data sets: no folder {folder}; name another with APFL_JAX_TFDS")
  return folder
