"""Models whose weights lie on several devices, or elsewhere while nothing runs."""
