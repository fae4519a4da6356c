"""What a device allows: profiles of small machines, and the bounds they set on a model."""
