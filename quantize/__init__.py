"""HDRQ: quantizers, block-wise reconstruction, noise-sampled rounding, and merging of quantized weights."""
