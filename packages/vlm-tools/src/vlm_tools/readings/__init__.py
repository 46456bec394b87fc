"""Where an answer comes from: relevance of image tokens, and points and masks made of it."""
