"""Image classification for the studies: momentum SGD and AdamW, fixed and adaptive."""
