"""What hangs on the backbone of a wrapped model: rows are copied before it and mixed after it."""
