"""Makes training and held-out sets: of text that is there, of text that a model writes, and of documents with facts."""
