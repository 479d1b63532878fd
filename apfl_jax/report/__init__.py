"""What people look at: the table that ends a run, and the page and pictures of a run directory."""

from apfl_jax.report.html import write
from apfl_jax.report.tables import table

__all__ = ["table", "write"]
