"""llama.cpp's file: tensors, tokenizer, and the writing of it."""
