"""What compression costs: KL, recall and agreement with the plain model."""
