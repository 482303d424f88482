"""The per-sample gradient engine, and the hooks and state keeping that passes over a model's data need."""
