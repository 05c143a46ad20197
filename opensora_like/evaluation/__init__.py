"""Scores against known truth, and the report of a run."""
