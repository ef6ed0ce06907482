"""`factorctl export`."""
