"""`factorctl run` and `factorctl demo`."""
