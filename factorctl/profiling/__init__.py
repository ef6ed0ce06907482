"""What factoring won: FLOPs, latency, memory, expert load."""
