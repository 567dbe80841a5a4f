"""What a terminal is shown of text that others wrote.

- `text`: control characters become escapes on their way to a stream
- `console`: rich's console, for such text

May import: nothing of the package.
"""
