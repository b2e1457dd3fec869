"""Skeleton + weights + heads → artifact, and its parity with torch."""
