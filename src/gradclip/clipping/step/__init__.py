"""Whether the optimizer steps, and who clips before it does."""
