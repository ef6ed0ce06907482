"""transformers' own mixtures of experts: architecture, config, tensors and files."""
