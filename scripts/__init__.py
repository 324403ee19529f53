"""What the commands beside it share."""
