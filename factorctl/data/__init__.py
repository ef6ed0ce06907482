"""DATA to token blocks: local files, Hub datasets, or text sampled from the model.

`spec` parses what the user wrote and imports nothing heavy.
`building.build_token_blocks` makes the cached blocks for calibration and training, `tokenizing.tokenize_documents` the
documents for perplexity, and `sampling.ModelSampler` the text of `self`.
"""
