"""Measurements: run.py writes rows into results/, report.py turns them into tables and plots."""
