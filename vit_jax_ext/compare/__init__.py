"""What models cost, how fast they are, and the report of a comparison."""
