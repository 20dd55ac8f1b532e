"""Loading and saving: what a repository holds, what is safe to load, and settings from files."""
