"""A latent space in twenty lines: sentences in, latents, sentences out, and the ways between them.

python examples/quickstart.py MODEL     # a folder that training wrote: `make demo` leaves runs/demo/model
python examples/quickstart.py           # a tiny random model: it runs at once, and what it writes is noise
"""

import sys

import torch

import lmvae_fast as lf

model = lf.LMVAE.from_pretrained(sys.argv[1]) if sys.argv[1:] else lf.testing.make_model()
sentences = ["a cat is a kind of animal", "the sun is a star"]

posterior = model.eval().encode(sentences)  # .mu and .logvar, [2, latent_dim]
print("KL to the prior, nats:", [round(kl, 2) for kl in posterior.kl().tolist()])
print("decoded:", model.decode(posterior.mu))  # greedy

way = lf.interpolate(model, *sentences, steps=5)
for weight, text in zip(way.weights, way.texts, strict=True):
    print(f"{weight:.2f}  {text}")

# Any number of latents: the engine refills its batch as sentences end.
draw = lf.GenerationConfig(do_sample=True, top_p=0.9, seed=0, batch_size=64)
for item in lf.generate(model, torch.randn(3, model.config.latent_dim), draw):
    print("from the prior:", item.index, item.text)

out = model(sentences, beta=0.5, seed=0)  # the training loss, one parallel pass
with lf.backend("reference"):  # the same in plain torch, without any kernel
    plain = model(sentences, beta=0.5, seed=0)
print(f"loss {out.loss.item():.4f}, in plain torch {plain.loss.item():.4f}")
