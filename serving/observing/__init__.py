"""What a replica writes down of its answers: decisions, metrics, slow requests."""
