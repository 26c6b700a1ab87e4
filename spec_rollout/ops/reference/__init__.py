"""Plain torch definitions of every op: slow, padded where that is clearer, in float64, and written
without a look at the kernels. Tests hold the kernels to them; nothing else should call them."""
