"""Text as documents and as token ids: what a user names, and what lies wherever Python is installed."""
