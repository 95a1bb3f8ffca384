"""Live comparisons with CEBRA and torch. A package: its files may be named as others are."""
