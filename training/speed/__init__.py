"""Speed, against the floor of the matrix products and against token-level peers."""
