"""What a person looks at after a run: figures in words, pictures."""
