"""What export, prompts and caches take in memory: each number is of a fresh process."""
