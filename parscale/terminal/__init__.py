"""Safe output of untrusted text to a terminal.

- `text`: escapes control characters in what is written to a stream
- `console`: rich's console for such text

May import: nothing of the package.
"""
