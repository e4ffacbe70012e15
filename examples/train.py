"""Train a LangVAE, look at it, keep it.

python examples/train.py FOLDER sentences.txt bert-base-cased gpt2     # your sentences, any encoder and decoder
python examples/train.py FOLDER                                        # the bundled corpus and tiny random models
"""

import sys

import lmvae_fast as lf

folder, *named = sys.argv[1:] or ["runs/example"]
if named:
    path, encoder, decoder = named
    data, steps = lf.read(path), None
    model = lf.LMVAE(lf.LMVAEConfig(encoder=encoder, decoder=decoder, latent_dim=128, max_len=32))
else:
    data, steps = lf.generate_corpus(400), 30
    model = lf.testing.make_model("llama", latent_dim=16, max_len=32)
train_data, held_out = data.split(held_out=0.1)

# LangVAE's recipe is the default; a killed run goes on bit for bit with resume=True.
config = lf.TrainConfig(output_dir=folder, max_steps=steps, batch_size=32, schedule="linear", warmup_steps=10)
result = lf.train(model, train_data, held_out, config)
print(f"{result.stop_reason} at step {result.step}, {result.tokens_per_second:,.0f} tokens/s")

figures = lf.evaluate(model, held_out)  # the bound and its parts, active units, BLEU, exact matches
print(f"ELBO {figures.elbo:.2f} nats, {figures.active_units} active units, BLEU-4 {figures.bleu:.3f}")

model.save_pretrained(f"{folder}/model")  # safetensors and JSON; lf.LMVAE.from_pretrained reads it back
