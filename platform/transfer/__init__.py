"""Transfer sets: what the teacher is asked about, and how far it lies from live traffic."""
