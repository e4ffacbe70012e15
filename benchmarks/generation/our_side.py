"""Our sides of a comparison, and transformers.generate.

usage: python -m benchmarks.generation.our_side CASE.json fp32|bf16|int8 FORM [rolling|prefix|adapters]

FORM `engine` is what `lf.generate` does, `top-p` the same with a draw, `logits` the same with every logit made and the
largest taken (greedy decoding needs none, a draw all), `plain` the engine without packed weights, `compiled` with the
decoder's body and head under torch.compile instead (static shapes, weights frozen into the code), `layers` with the layers
of a step called one by one from Python; `eager` the same loop with
every op in plain torch and no packed weights; `transformers` is `model.generate` of Hugging Face's own modules over a static
cache that begins with the same memory, which only `prefix` visibility can be expressed in. int8 is a bf16 decoder with
`weights="int8"`; `adapters`: prefix visibility, and a decoder with low-rank adapters that do something. All but `top-p`
decode greedily, and none stops early.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

import torch
import torch._inductor.config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, StaticCache

import lmvae_fast as lf
from benchmarks.common.worker import serve
from lmvae_fast.integrations.langvae import load_checkpoint
from lmvae_fast.kernels.sample_token import sample_token
from lmvae_fast.models.decoder.decode_body import DecodeBody
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.tuning import Tuning

warnings.filterwarnings("ignore")


class OurSide:
    """A model loaded from LangVAE's checkpoint folder; with `prefix` and `adapters`, its slots are all seen by every token."""

    def __init__(self, case: dict, precision: str, form: str, kind: str = "rolling") -> None:
        torch.set_num_threads(case["threads"])
        self.form, self.limit = form, case["tokens"]
        self.weights = "int8" if precision == "int8" else None
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.model = load_checkpoint(case["checkpoint"]).eval()
        if kind != "rolling":
            config = self.model.config.replace(visibility="prefix")
            projector = self.model.projector
            self.model = lf.LMVAE(config, encoder=self.model.encoder, decoder=self.model.decoder).eval()
            self.model.projector = projector
        if kind == "adapters":
            self._adapt()
        if dtype != torch.float32:
            decoder = self.model.decoder
            self.model.decoder = Decoder(decoder.model.to(dtype), decoder.tokenizer)
        if form == "transformers":
            self.decoder = AutoModelForCausalLM.from_pretrained(case["decoder"], dtype=dtype).eval()
        if form == "compiled":
            self._compile()
        if form == "layers":
            DecodeBody.in_use = False
        if form == "logits":
            decoder = self.model.decoder
            decoder.greedy_step = lambda ids, cache, injection, pack: sample_token(
                decoder.step(ids, cache, injection), greedy=True
            )
        self.bos = self.model.decoder.tokenizer.bos_token_id
        self.model.decoder.tokenizer.eos_token_id = -1  # no sentence ends early
        self.z = load_file(case["latents"])["z"]

    def _adapt(self) -> None:
        torch.manual_seed(0)  # every side draws the same adapters
        decoder = self.model.decoder
        decoder = Decoder(decoder.model, decoder.tokenizer, train=True, tuning=Tuning("lora", rank=16, alpha=32.0))
        with torch.no_grad():
            for name, weight in decoder.named_parameters():
                if ".lora_B." in name:
                    weight.copy_(0.01 * torch.randn(weight.shape))
        self.model.decoder = decoder.eval()

    def _compile(self) -> None:
        torch._inductor.config.freezing = (
            True  # the weights are constants: their layout is settled once, as packing does
        )
        torch._dynamo.config.recompile_limit = 64  # one compilation per batch size, and one for a single token's run
        decoder = self.model.decoder
        decoder.body.forward = torch.compile(decoder.body.forward, dynamic=False)
        decoder.logits = torch.compile(decoder.logits, dynamic=False)

    def ids(self, batch: int) -> dict:
        """The tokens it decodes."""
        return {"ids": self._decode(batch, self.limit)}

    def decode(self, batch: int, tokens: int | None = None) -> dict:
        """Latents to strings, and the processor time of all threads that it took."""
        start = time.process_time()
        ids = self._decode(batch, tokens or self.limit)
        if self.form == "transformers":  # the engine has made its strings already
            self.model.decoder.tokenizer.decode(ids)
        return {"cpu_seconds": time.process_time() - start}

    def _decode(self, batch: int, tokens: int) -> list[list[int]]:
        if self.form == "transformers":
            return self._transformers(batch, tokens)
        packed = self.form in ("engine", "layers", "top-p", "logits")
        draw = {"do_sample": True, "top_p": 0.9, "seed": 0} if self.form == "top-p" else {}
        config = lf.GenerationConfig(
            batch_size=batch, max_new_tokens=tokens, pack_weights=packed, weights=self.weights, **draw
        )
        with lf.backend("reference" if self.form == "eager" else "auto"):
            return [out.ids for out in lf.generate(self.model, self.z[:batch], config)]

    @torch.no_grad()
    def _transformers(self, batch: int, tokens: int) -> list[list[int]]:
        memory = self.model.inject(self.z[:batch]).memory
        slots = memory.shape[4]
        cache = StaticCache(config=self.decoder.config, max_cache_len=slots + tokens + 1)
        for layer in range(memory.shape[0]):
            cache.update(memory[layer, 0], memory[layer, 1], layer, {"cache_position": torch.arange(slots)})
        # places for the ids that stand for the memory; they are never read
        ids = torch.full((batch, slots + 1), self.bos)
        out = self.decoder.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, pad_token_id=self.bos, eos_token_id=None,
        )  # fmt: skip
        return out[:, slots + 1 :].tolist()


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        serve(OurSide(json.load(file), *sys.argv[2:]))
