"""What a decision does to the gradients: the second pass."""
