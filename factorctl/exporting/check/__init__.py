"""The proof that an export computes what the native checkpoint computes, in the engine it is for."""
