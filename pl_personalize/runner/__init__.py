"""Task by user by method: the stages of an experiment, resumable."""
