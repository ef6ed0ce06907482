"""Losses, loop, schedule and state of finetuning."""
