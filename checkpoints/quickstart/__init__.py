"""The main job on what is at hand: a small model is converted, trained, compared and tried."""
