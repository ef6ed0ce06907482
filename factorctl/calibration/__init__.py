"""What the dense model does, one layer at a time, in bounded memory; and the closed-form steps that use it."""
