"""Parts of ``importance_analysis.py``."""
