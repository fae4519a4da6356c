"""What compression saves in time: graphs that run in turns in one process."""
