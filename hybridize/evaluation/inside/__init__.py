"""What happens inside a hybrid: what each mixer is worth, what it keeps, and what it looks at (see README.md)."""
