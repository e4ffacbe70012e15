"""Runs inside LangVAE 0.6.13's own virtual environment: loads a folder, decodes, takes a training step, writes figures.

usage: python langvae_child.py CHECKPOINT INPUTS.safetensors SENTENCES.json OUTPUTS.safetensors

Inputs: ``z`` [N, nz], ``eps`` [B, nz], ``beta`` and ``target_kl`` [1], optionally ``labels`` [B, S, A] (one-hot).
Outputs: ``decode_ids``, ``loss``, ``recon_loss``, ``kl_loss``, ``probabilities``, ``target_ids``, ``grad.<name>``.
"""

from __future__ import annotations

import json
import sys

import torch
from langvae import LangVAE
from langvae.data_conversion.tokenization import TokenizedDataSet, collate_sparse_fn
from safetensors.torch import load_file, save_file

checkpoint, inputs_path, sentences_path, outputs_path = sys.argv[1:]
torch.set_num_threads(1)
inputs = load_file(inputs_path)
with open(sentences_path, encoding="utf-8") as file:
    sentences = json.load(file)

model = LangVAE.load_from_folder(checkpoint)
model.eval()  # load_from_folder leaves dropout on
model.cur_beta, model.target_kl = inputs["beta"].item(), inputs["target_kl"].item()
model._sample_gauss = lambda mu, std: (mu + inputs["eps"] * std, inputs["eps"])

data = TokenizedDataSet(sentences, model.decoder.tokenizer, model.decoder.max_len)
batch = collate_sparse_fn([data[i] for i in range(len(sentences))])
if "labels" in inputs:
    batch["labels"] = inputs["labels"]
dense = batch["data"].to_dense().long()
targets = torch.where(dense.any(-1), dense.argmax(-1), model.decoder.tokenizer.pad_token_id)

out = model(batch)
out.loss.backward()
results = {
    "loss": out.loss.detach().reshape(1),
    "recon_loss": out.recon_loss.detach().reshape(1),
    "kl_loss": out.reg_loss.detach().reshape(1),
    "probabilities": out.recon_x.detach(),
    "target_ids": targets,
}
if not model.decoder.conditional:
    with torch.no_grad():
        results["decode_ids"] = model.decoder(inputs["z"])["reconstruction"].argmax(-1)
    with open(outputs_path + ".json", "w", encoding="utf-8") as file:
        json.dump(model.decode_sentences(inputs["z"]), file)
for name, parameter in model.named_parameters():
    results[f"grad.{name}"] = parameter.grad
save_file({name: value.contiguous() for name, value in results.items()}, outputs_path)
