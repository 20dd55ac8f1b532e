"""Speed, against the floor of the matrix products and beside other methods."""
