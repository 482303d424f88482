"""Pure tensor functions: every formula of the project, once. No Trainer, no files, no logging."""
