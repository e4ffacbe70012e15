"""The ops, one folder each; installed as `lmvae_fast.kernels`. Nothing is imported here: see docs/adding_an_op.md."""
