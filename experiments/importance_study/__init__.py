"""What ``importance_analysis.py`` is made of."""
