"""What each kind of cache computes: in torch for evaluation, and as operators of a graph. Needs torch."""
