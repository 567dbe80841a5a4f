"""Text as documents and as token ids: data that a user names, and text that comes with Python."""
