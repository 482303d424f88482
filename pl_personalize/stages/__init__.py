"""Stages of an experiment: resumable pieces of work, their folder, their logs, and the means to train in them."""
