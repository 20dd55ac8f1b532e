"""What is trained, one recipe a file."""
