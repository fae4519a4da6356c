"""Measures what an artifact costs and saves, compared with the plain export of the same model."""
