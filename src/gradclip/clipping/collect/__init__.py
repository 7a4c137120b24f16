"""Which tensors: found, checked, named, and sorted by the policy that bounds them."""
