"""How bytes reach the disk and are known again: for checkpoints, blocks of text, reports and kernels alike."""
