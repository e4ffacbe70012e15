"""Looking at a latent space: interpolation, traversal, arithmetic, neighbourhoods, and their drawings."""
