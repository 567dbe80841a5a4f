"""The quickstart: converts, trains, compares and tries a small model, with what is on this machine."""
