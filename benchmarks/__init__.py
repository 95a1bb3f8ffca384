"""Speed as ratios against the peer in the same run. ``python -m benchmarks --help``."""
