"""The Transformer: embeddings, positions, attention, feed-forward, norms, blocks, and the decoder built of them."""
