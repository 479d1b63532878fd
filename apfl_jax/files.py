"""Files that appear whole or not at all, and the folder of those that may be lost."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
  """Where decoded images and compiled programs are kept: `APFL_JAX_CACHE`, else ~/.cache/apfl_jax."""
  return Path(os.environ.get("APFL_JAX_CACHE") or "~/.cache/apfl_jax").expanduser()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A hidden temporary path beside `path`, which takes its place once it is written, and else disappears."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two runs at once may fill the same cache
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
  """A file of this content, text in UTF-8, that appears whole."""
  with replacing(path) as temporary:
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
