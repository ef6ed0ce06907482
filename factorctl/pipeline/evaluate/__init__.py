"""`factorctl eval`."""
