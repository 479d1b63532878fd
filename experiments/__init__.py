"""The binaries of apfl_jax."""
