"""`factorctl factorize`."""
