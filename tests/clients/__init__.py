"""The artifact in every client that docs/clients.md names, each run for real."""
