"""Publishing on the Hugging Face Hub: repositories that load with this package installed, and without it."""
