"""`factorctl profile`."""
