"""Prefix tuning in JAX."""
