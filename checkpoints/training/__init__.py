"""Post-training of a checkpoint: settings, data, the Trainer, a run's folder and its result."""
