"""What a device allows: profiles of small machines, and the limits they set for a model."""
