"""What an artifact costs and saves, measured next to the plain export of the same model."""
