"""Fused operations, one file each: the formula, the public function, its torch reference, and the kernel beside it."""
