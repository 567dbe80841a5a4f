"""What a terminal is shown of text that others wrote."""
