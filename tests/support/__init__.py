"""What tests share: tiny models, artifacts and graphs, and ways to open them."""
