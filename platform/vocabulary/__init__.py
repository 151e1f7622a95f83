"""Students with a small vocabulary of their own (paper 004): words, dual training, export."""
