"""What factoring cost: perplexity, task accuracy, layer fidelity, and the controls."""
