"""`factorctl try`: the dense and the factored model continue the same prompts."""
