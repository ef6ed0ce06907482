"""`factorctl frontier`."""
