"""Operations that decide the engine's speed, one file each: formula, public function, torch reference.

The references run on every device; fused kernels will stand beside them.
"""
