"""Models: an encoder, a posterior, an injection of the latent into a decoder, and the presets of published systems."""
