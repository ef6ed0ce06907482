"""llama.cpp's file as a dense source: its header, names, weights and vocabulary."""
